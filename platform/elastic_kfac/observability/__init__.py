"""The metric table, telemetry and the structured log."""
