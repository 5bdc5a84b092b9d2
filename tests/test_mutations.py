"""The list of mutations fits the scripts and the tests. No engine; a second."""

from mutate import misfits, read_mutations


def test_the_list_of_mutations_fits_the_scripts_and_the_tests():
    assert misfits(read_mutations()) == []
