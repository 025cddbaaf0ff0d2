"""Training: `losses`, `negatives`, `objectives`, `steps`, `loop`.

`steps` holds the two steps, `loop` the one loop that drives them; then
`optimizers`, `propensity` and `checkpoints`.
"""
