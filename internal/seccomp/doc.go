// Package seccomp starts programs of which chosen system calls are answered by this process: a filter with a user notification
// (Linux 5.14 and later; neither root nor a kernel module). The filter is the program's and that of everything it starts, and
// cannot be taken off. Linux on amd64 and arm64 only.
//
// A program that uses the package calls Main first: the filter has to be installed by the process that becomes the program, so the
// own executable is started once more, as a launcher.
package seccomp
