"""The command `hawada` in the tests' own process: no start and no imports to wait for."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from hawada import cli
from hawada.report import console


class Outcome(NamedTuple):
    """What a command left for the user to see."""

    code: int
    out: str
    err: str


def hawada(*arguments: str) -> Outcome:
    """Run the command; the process keeps its CPUs and threads."""
    threads = torch.get_num_threads()
    GlobalHydra.instance().clear()
    cli._jobs.clear()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["hawada", *arguments]),
        mock.patch.dict(os.environ),
        mock.patch.object(os, "sched_setaffinity", lambda *_: None, create=True),
        mock.patch.object(console, "_width", 240),
        mock.patch.object(Hydra, "get_mode", lambda *_, **__: None),  # composes once more to find no hydra.mode
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        os.environ.pop("HYDRA_FULL_ERROR", None)
        cli.main()
    GlobalHydra.instance().clear()
    torch.set_num_threads(threads)
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())
