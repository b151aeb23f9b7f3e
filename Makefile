# make check is what has to be clean before a change is sent.
.PHONY: check format

check:
	ruff format --check .
	ruff check .
	mypy
	pytest

format:
	ruff format .
	ruff check --fix .
