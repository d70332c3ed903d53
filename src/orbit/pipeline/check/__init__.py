"""`orbit check`: a run looked at before it is paid for."""

from orbit.pipeline.check.check import check
from orbit.pipeline.check.findings import Finding, Report

__all__ = ["Finding", "Report", "check"]
