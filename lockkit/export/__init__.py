"""Export: a locked or an original model as an ONNX graph that common runtimes serve.

    from lockkit.export import ExportConfig, ExportSession, export_model

The heavy libraries are imported when something runs, not here.
"""

from lockkit.export.config import ExportConfig
from lockkit.export.manifest import check_manifest
from lockkit.export.run import ExportResult, export_model
from lockkit.export.session import ExportSession
from lockkit.targets import Precision, Provider

__all__ = [
    "ExportConfig",
    "ExportResult",
    "ExportSession",
    "Precision",
    "Provider",
    "check_manifest",
    "export_model",
]
