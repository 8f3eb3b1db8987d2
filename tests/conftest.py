"""One thread per test process, equal random numbers for each test, what each test costs."""

import random
import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from processor_time import ProcessorTime, add_options
from shared_starts import make_scheduler

# The processes of pytest-xdist share the cores.
torch.set_num_threads(1)

# What a shell starts in the background ignores SIGINT, and what nohup starts SIGHUP. So would the
# runs that tests stop by them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A busy machine is no failure.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def equal_random_numbers():
    """What a test draws depends neither on the tests before it nor on how they are spread."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what the code under test may draw from
    random.seed(0)


def pytest_addoption(parser):
    add_options(parser)


def pytest_configure(config):
    config.pluginmanager.register(ProcessorTime(config), "processor time")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return make_scheduler(config, log)
