"""What happens in a model and on a machine: `report`, `audit` and `doctor`."""

from .calls import Report, Row, report
from .layers import Audit, Layer, audit
from .machine import Diagnosis, Finding, doctor

__all__ = ["Audit", "Diagnosis", "Finding", "Layer", "Report", "Row", "audit", "doctor", "report"]
