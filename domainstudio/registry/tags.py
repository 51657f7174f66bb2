"""Tags by which a version is found again."""

KEY, DIGEST = "domainstudio.key", "domainstudio.digest"
"""Hash of the parameters and inputs of a result, and hash of its model folder."""
