"""Tags of a registered model's versions."""

KEY, DIGEST = "domainstudio.key", "domainstudio.digest"
"""Hash of the parameters and inputs of a result, and hash of its model folder: they identify a version."""

MEASUREMENT = "domainstudio.measured"
"""The figures of a version and the conditions under which they were measured (`Measurement`)."""

VERDICT, REASON, FIGURES, JUDGED = "gate", "gate.reason", "gate.figures", "gate.judged"
"""The gate's verdict, its reason in one line, the compared figures, the hash of the judged measurement."""

PENDING = "pending"
"""The verdict of a version whose registration is not finished."""
