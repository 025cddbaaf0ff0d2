"""Scripts that run under the interpreters of other libraries."""
