"""One thread a test process, since the processes of pytest-xdist share the cores; what tests cost."""

import torch
from processor_time import ProcessorTime, add_options

torch.set_num_threads(1)


def pytest_addoption(parser):
    add_options(parser)


def pytest_configure(config):
    config.pluginmanager.register(ProcessorTime(config), "processor time")
