"""Use of trained models: Predictor, explanations, serving."""
