"""From a model's call to a program: Dynamo's trace, retraced, with every guard and input accounted for."""
