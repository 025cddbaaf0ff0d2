"""Times in text: numbers, and dates as people and programs write them."""

import decimal

import polars as pl

from pin_jax.data.interactions import RowError

_ISO_DATE = r"^\d{4}-\d{2}-\d{2}"
_FINER = r"\.\d{7}"  # seconds with more digits than microseconds
_UTC = r"\s*(UTC|GMT)$"
_DAYS = (
  "%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%m/%d/%y", "%d/%m/%y",
  "%d.%m.%Y", "%d.%m.%y", "%Y/%m/%d", "%B %d, %Y", "%d %B %Y", "%d-%B-%Y",
  "%d-%B-%y", "%m %d, %Y",
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S%.f", " %I:%M %p", " %I:%M:%S %p",
           ", %I:%M:%S %p")
_EPOCHS = (1e8, 2.1e9)  # 1973 to 2036, in Unix seconds
_DATE = (
  r"^(\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|\w{3,9} \d{1,2}, \d{4}"
  r"|\d{1,2}[- ][A-Za-z]{3,9}[- ]\d{2,4})\b"
)


def parse(texts: pl.Series) -> tuple[pl.Series, str]:
  """Texts as Int64, Float64 or Datetime, and in which form dates were read.

  Nulls stay. Of dates that may be month/day or day/month throughout, the month
  is taken to come first; the form then says so.

  Raises:
    RowError: for the first that is neither a number nor a date like the others,
      or whose order would be lost.
  """
  texts = texts.str.strip_chars()
  for kind in (pl.Int64, pl.Float64):
    times = texts.cast(kind, strict=False)
    if times.null_count() == texts.null_count():
      if kind == pl.Float64:
        _check_numbers(texts, times)
      return times, ""
  bad = texts.str.contains(_FINER).fill_null(False)
  if bad.any():
    row = bad.arg_max()
    raise RowError(
      "times", row, f"= {texts[row]!r} is finer than microseconds; use a "
      "coarser unit"
    )
  first = texts.is_not_null().arg_max()
  if times[first] is not None:  # so must be the others
    found, form = times, ""
  elif texts.str.contains(_ISO_DATE)[first]:
    found, form = _iso(texts), ""
  else:
    found, form = _dates(texts.str.replace(_UTC, ""))
  bad = found.is_null() & texts.is_not_null()
  if bad.any():
    row = bad.arg_max()
    raise RowError(
      "times", row, f"= {texts[row]!r} is neither a number nor a date like the "
      "others; correct it, or write dates as 2024-01-31 10:00:00"
    )
  return found, form


def looks_like(values: pl.Series) -> bool:
  """Whether they are dates, or numbers in the range of Unix times."""
  values = values.drop_nulls()
  if values.dtype.is_temporal() or not len(values):
    return bool(len(values))
  if values.dtype == pl.String:
    numbers = values.str.strip_chars().cast(pl.Float64, strict=False)
    if numbers.null_count():
      return bool(values.str.contains(_DATE).all())
    values = numbers
  if not values.dtype.is_numeric():
    return False
  return any(
    values.is_between(*(unit * x for x in _EPOCHS)).all()
    for unit in (1, 1e3, 1e6, 1e9)
  )


def _check_numbers(texts: pl.Series, times: pl.Series) -> None:
  """Raises RowError where floats merge numbers that differ as written."""
  spellings = pl.DataFrame({"text": texts, "time": times}).unique()
  for _, own in spellings.filter(
    pl.col("time").is_duplicated() & pl.col("time").is_finite()
  ).group_by("time"):
    written = {decimal.Decimal(text): text for text in own["text"]}
    if len(written) > 1:
      one, two = sorted(written.values())[:2]
      raise RowError(
        "times", (texts == two).arg_max(), f"= {two} and {one} are one as "
        "float64, since not all are integers of 64 bits; use a coarser unit"
      )


def _iso(texts: pl.Series) -> pl.Series:
  """ISO dates in microseconds; null where a text is none."""
  dated = texts.str.contains(_ISO_DATE)
  try:
    dates = texts.str.replace(_UTC, "Z").str.to_datetime(
      time_unit="us", strict=False
    )
  except pl.exceptions.PolarsError:  # none of them, or zones with and without
    return pl.Series([None] * len(texts), dtype=pl.Datetime("us"))
  return pl.select(pl.when(dated).then(dates)).to_series()


def _dates(texts: pl.Series) -> tuple[pl.Series, str]:
  """Dates of the first form that suits most, null elsewhere; the form."""
  first = texts.drop_nulls().head(1)
  forms = [day + clock for day in _DAYS for clock in _CLOCKS]
  forms = [form for form in forms if not _by(first, form).null_count()]
  found = {form: _by(texts, form) for form in forms}
  if not found:
    return pl.Series([None] * len(texts), dtype=pl.Datetime("us")), ""
  form = min(found, key=lambda form: found[form].null_count())
  suits = [x for x in found if found[x].null_count() == texts.null_count()]
  doubt = ", though every one may be day before month" * (len(suits) > 1)
  return found[form], form + doubt


def _by(texts: pl.Series, form: str) -> pl.Series:
  """Dates of one form; null for others, and for years of two digits by %Y."""
  dates = texts.str.to_datetime(form, time_unit="us", strict=False)
  return pl.select(pl.when(dates.dt.year() >= 1000).then(dates)).to_series()
