"""The efficiencies and the runs they come from."""

import pytest

from iomm.plan import calibration
from iomm.plan.calibration import RUNS, Efficiency, checks, fit, predicted_tokens_per_s, spread


def test_every_run_and_kernel_names_its_source():
    assert all(run.address for run in RUNS)
    measured = [source for source in calibration.KERNELS if source.address == "-"]
    assert all("assumption" in source.value for source in measured)


def test_no_run_beats_the_kernels_ceilings():
    assert all(run.tokens_per_s < predicted_tokens_per_s(run, Efficiency()) for run in RUNS)


def test_a_factor_fitted_to_one_run_gives_that_run():
    for run in RUNS:
        assert predicted_tokens_per_s(run, fit([run])) == pytest.approx(run.tokens_per_s)


def test_the_fit_balances_its_errors_and_lies_between_the_extremes():
    low, high = spread()
    assert low.system < fit().system < high.system
    product = 1.0
    for check in checks():
        product *= 1 + check.error
    assert product == pytest.approx(1)


def test_leaving_a_run_out_makes_its_error_larger():
    assert all(abs(check.left_out_error) >= abs(check.error) for check in checks())


def test_the_shape_of_llama_8b_has_its_number_of_weights():
    assert RUNS[-1].shape.weights == 8_030_261_248  # Llama 3.1 8B, config.json
