"""One thread per test process, as those of pytest-xdist share the cores; what each test costs."""

import torch
from processor_time import ProcessorTime, add_options

torch.set_num_threads(1)


def pytest_addoption(parser):
    add_options(parser)


def pytest_configure(config):
    config.pluginmanager.register(ProcessorTime(config), "processor time")
