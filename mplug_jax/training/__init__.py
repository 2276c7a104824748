"""Train state, train step, the train loop and evaluation runs."""
