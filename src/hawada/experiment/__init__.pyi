from .job import Job as Job
from .plan import INTERLINGUA as INTERLINGUA, PLANS as PLANS, order as order, planned as planned, upstream as upstream
from .run import Run as Run
from .tracking import MetricsLog as MetricsLog
