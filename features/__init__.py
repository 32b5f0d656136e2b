"""Raw rows to model input: schema, fitted encoders, prepared data sets, batches and the statistics of scores."""
