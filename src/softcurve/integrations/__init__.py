"""softcurve in the training loops of other libraries, each in a module that is imported only on request.

``softcurve.integrations.transformers`` has metrics, distillation and a curvature callback for ``transformers.Trainer``,
``softcurve.integrations.lightning`` the callback for ``lightning.Trainer``.
"""
