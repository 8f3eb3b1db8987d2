"""One thread per test process, as those of pytest-xdist share the cores; what each test costs."""

import signal

import torch
from hypothesis import HealthCheck, settings
from processor_time import ProcessorTime, add_options

torch.set_num_threads(1)

# What a shell starts in the background ignores SIGINT, and so would the runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_addoption(parser):
    add_options(parser)


def pytest_configure(config):
    config.pluginmanager.register(ProcessorTime(config), "processor time")
