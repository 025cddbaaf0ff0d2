"""Interactions: where they come from and what training draws from them.

`interactions`, its readers (`files` with `times`, `tfds`, `simulator`,
`stored`), then `splits`, `activeness` and `batches`.
"""
