"""Files written whole, S3, and the mirror of checkpoints. The only home of boto3."""
