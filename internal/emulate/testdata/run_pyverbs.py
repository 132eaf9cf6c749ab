# Runs modules of rdma-core's tests and prints a line a test: its name, the result, and the reason of one that did not pass.
# Arguments: the folder that has the package `tests`, a file for the lines, the device, modules.
import sys
import unittest

top, out, device, *modules = sys.argv[1:]
sys.path[:0] = [top, top + '/tests']
sys.argv = [sys.argv[0], '--dev', device]
from args_parser import parser  # noqa: E402

parser.parse_args()
lines = open(out, 'a', buffering=1)


class Result(unittest.TestResult):
    def line(self, test, word, why=''):
        lines.write(' '.join([test.id().removeprefix('tests.'), word] + why.split()) + '\n')

    def addSuccess(self, test):
        self.line(test, 'ok')

    def addSkip(self, test, why):
        self.line(test, 'skipped', why)

    def addError(self, test, err):
        self.line(test, 'failed', str(err[1]))

    addFailure = addError


for m in modules:
    unittest.defaultTestLoader.loadTestsFromName('tests.' + m).run(Result())
