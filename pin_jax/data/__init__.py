"""Interactions: where they come from and what training draws from them.

`interactions`, its readers (`files`, `tfds`, `simulator`, `stored`), then
`splits`, `activeness` and `batches`.
"""
