"""Numbers, sizes, durations and names of metrics read well."""

from t5tune.formatting import format_duration, format_metric_name, format_number, format_size


def test_a_size_is_written_in_the_unit_that_fits_it() -> None:
    assert format_size(634 * 10**6) == "0.59 GiB"
    assert format_size(24 << 30) == "24.00 GiB"
    assert format_size(12 << 20) == "12.00 MiB"
    assert format_size(1234) == "1.21 KiB"
    assert format_size(0) == "0.00 KiB"


def test_numbers_durations_and_metric_names_are_short() -> None:
    assert [format_number(value) for value in (5.0, 0.00012345, 12.3456, 81920, 2118.4)] == [
        "5", "0.0001234", "12.35", "81,920", "2,118",
    ]  # fmt: skip
    assert [format_duration(seconds) for seconds in (9.46, 248, 11_100)] == ["9.5 s", "4 min 08 s", "3 h 05 min"]
    names = [format_metric_name(name) for name in ("exact_match", "rougeL", "field_f1", "mine")]
    assert names == ["exact match", "ROUGE-L", "field F1", "mine"]
