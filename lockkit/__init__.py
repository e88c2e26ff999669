"""lockkit: lock a pretrained language model, export it to ONNX, and verify that the export is the same model.

The Python API has the same verbs as the command line, with the same settings and defaults:

    plan       plan_model
    lock       lock_model, LockConfig
    export     export_model, ExportConfig
    verify     verify_export, VerifyConfig
    kernel     build_kernel, install_kernel, remove_kernel
    bench      bench_export, BenchConfig
    attack     run_audit, audit_config, AuditConfig
    generate   open_model, generate_text, GenerateConfig
    serve      serve_export, open_app, ServeConfig
    report     write_report
    card       write_card, write_bom
    sign       sign_folder, SignConfig, check_signature, CheckConfig
    web        web_folder
    push       push_folder, PushConfig
    env        describe_environment

A name is loaded when it is first used, so `import lockkit` imports no heavy library.
"""

from __future__ import annotations

import importlib
from typing import Any

from lockkit.version import __version__

# Public name -> its module, and after a colon its name there if that differs.
_HOMES = {
    "plan_model": "lockkit.lock.plan",
    "LockConfig": "lockkit.lock.config",
    "lock_model": "lockkit.lock.run",
    "ExportConfig": "lockkit.export.config",
    "export_model": "lockkit.export.run",
    "VerifyConfig": "lockkit.verify.config",
    "verify_export": "lockkit.verify.run",
    "build_kernel": "lockkit.kernel",
    "install_kernel": "lockkit.kernel",
    "remove_kernel": "lockkit.kernel",
    "BenchConfig": "lockkit.bench.config",
    "bench_export": "lockkit.bench.run:bench",
    "AuditConfig": "lockkit.attack.config",
    "audit_config": "lockkit.attack.config",
    "run_audit": "lockkit.attack.run",
    "GenerateConfig": "lockkit.generate",
    "open_model": "lockkit.generate",
    "generate_text": "lockkit.generate:generate",
    "ServeConfig": "lockkit.serve.config",
    "serve_export": "lockkit.serve.server",
    "open_app": "lockkit.serve.server",
    "write_report": "lockkit.report.run",
    "write_card": "lockkit.publish.card",
    "write_bom": "lockkit.publish.bom",
    "SignConfig": "lockkit.publish.config",
    "sign_folder": "lockkit.publish.sign",
    "CheckConfig": "lockkit.publish.config",
    "check_signature": "lockkit.publish.sign",
    "web_folder": "lockkit.publish.web",
    "PushConfig": "lockkit.publish.config",
    "push_folder": "lockkit.publish.push",
    "describe_environment": "lockkit.environment",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lockkit' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)
