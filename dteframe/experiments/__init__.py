"""What is done with runs and traces: judge estimators."""
