"""What a step costs: rates, and a trace of a window of steps."""

from small_runs import changed, events, terminating

from k2jax.training.loop import train
from k2jax.training.profiling import Speed


def test_rates_follow_from_the_seconds_of_a_step_and_its_wait():
    found = Speed(tokens=1000, flops=6e6, peak=1e10).compute_rates(1.5, 0.5)
    assert found["tokens_per_second"] == 500
    assert found["flops_per_second"] == 3e9
    assert found["mfu"] == 0.3
    assert "mfu" not in Speed(1000, 6e6, 0.0).compute_rates(1.0, 0.0)


def test_a_window_of_steps_is_profiled(run, tmp_path):
    train(changed(run, "train", profile="2:3"), tmp_path / "out", say=terminating(4, []))
    assert list((tmp_path / "out/profile").rglob("*.xplane.pb"))
    (event,) = events(tmp_path / "out")
    assert (event["event"], event["step"], event["steps"]) == ("profiled", 3, [2, 3])


def test_a_profile_is_complete_though_the_run_stops_in_its_window(run, tmp_path):
    train(changed(run, "train", profile="1:3"), tmp_path / "out", say=terminating(2, []))
    assert list((tmp_path / "out/profile").rglob("*.xplane.pb"))
    assert [event["event"] for event in events(tmp_path / "out")] == ["profiled"]
