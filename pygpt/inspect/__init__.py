"""What happens in a model and on a machine: `report`, `audit` and `doctor`."""

from .calls import Report, Row, report
from .layers import Audit, Layer, audit

__all__ = ["Audit", "Layer", "Report", "Row", "audit", "report"]
