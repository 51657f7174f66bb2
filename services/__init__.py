"""A team's servers on one machine: S3, PostgreSQL, MLflow, a Prefect server and a worker.

`python -m services start` starts them under supervisord; `Team` is the same for tests.
"""

from services.layout import ServiceError, free_ports
from services.team import ServiceState, Team

__all__ = ["ServiceError", "ServiceState", "Team", "free_ports"]
