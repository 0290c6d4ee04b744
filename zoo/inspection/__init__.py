"""Looking into models: `zoo xray`, tables, reports."""
