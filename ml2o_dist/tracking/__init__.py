"""MLflow: one run per meta-training (`sink`), versions of learned optimizers (`registry`). Nothing else imports it."""
