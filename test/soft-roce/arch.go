//go:build linux

package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
)

// An arch is an architecture that machines may have. One that is not the host's is emulated, and has its own C library, shell and
// the like from Debian's packages, where a machine like the host uses the host's.
type arch struct {
	name    string // as Go and Debian have it
	triplet string // of Debian's folders of libraries, and of its compilers
	linker  string // the file of the dynamic linker
	elf     elf.Machine
	qemu    hostProgram
	machine string // QEMU's
	cpu     string // QEMU's, where no KVM runs it
	console string // the kernel's device of QEMU's serial port
	options string // the kernel's, further ones
}

var arches = []*arch{
	{
		name: "amd64", triplet: "x86_64-linux-gnu", linker: "usr/lib64/ld-linux-x86-64.so.2", elf: elf.EM_X86_64,
		qemu: hostProgram{"qemu-system-x86_64", "qemu-system-x86"},
		// microvm hangs in the calibration of its clock at times.
		machine: "pc",
		// What makes programs choose code that is slow to emulate is left out: with erms, kernel and libraries copy and clear byte by
		// byte (by words without it: 64 KiB through a pipe in 0.15 ms instead of 0.5), and the carry-less multiplication makes a CRC
		// take half as long again as a table does.
		cpu:     "max,-erms,-pclmulqdq",
		console: "ttyS0", options: "no_timer_check tsc=reliable",
	},
	{
		name: "arm64", triplet: "aarch64-linux-gnu", linker: "usr/lib/ld-linux-aarch64.so.1", elf: elf.EM_AARCH64,
		qemu:    hostProgram{"qemu-system-aarch64", "qemu-system-arm"},
		machine: "virt,gic-version=max",
		// Addresses are signed with a function of QEMU's own: the architecture's is slow to emulate.
		cpu:     "max,pauth-impdef=on",
		console: "ttyAMA0",
	},
}

// findArch returns the architecture of a name.
func findArch(name string) (*arch, error) {
	var names []string
	for _, a := range arches {
		if a.name == name {
			return a, nil
		}
		names = append(names, a.name)
	}
	return nil, fmt.Errorf("-arch %s: there are %s", name, strings.Join(names, " and "))
}

// foreign is whether it is not the host's.
func (a *arch) foreign() bool { return a.name != runtime.GOARCH }

// compiler is the packages' name of the architecture in those of the host that make programs for it.
func (a *arch) compiler() (gcc, strip hostProgram) {
	gcc, strip = hostProgram{a.triplet + "-gcc", "gcc"}, hostProgram{a.triplet + "-strip", "binutils"}
	if a.foreign() {
		suffix := "-" + strings.ReplaceAll(a.triplet, "_", "-")
		gcc.pkg, strip.pkg = gcc.pkg+suffix, strip.pkg+suffix
	}
	return gcc, strip
}

// program returns the file of this program for the architecture, which serves as the machine's /init. For one that is not the host's
// it is built, in dir: from the same source, unless this was built elsewhere than where it is started.
func (a *arch) program(ctx context.Context, dir string) ([]byte, error) {
	path, err := os.Executable()
	if a.foreign() {
		path, err = a.build(ctx, dir)
	}
	if err != nil {
		return nil, err
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Machine != a.elf {
		return nil, fmt.Errorf("%s is built for %v, and the machine is an %s one", path, f.Machine, a.name)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, errors.New("this program is linked dynamically (built with -race, perhaps), but has to be the machine's /init: build it with CGO_ENABLED=0")
		}
	}
	return os.ReadFile(path)
}

func (a *arch) build(ctx context.Context, dir string) (string, error) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", errors.New("this program does not know what it is built from")
	}
	path := filepath.Join(dir, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", path, info.Path)
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+a.name, "CGO_ENABLED=0")
	if _, err := output(cmd); err != nil {
		return "", fmt.Errorf("build this program for %s, which takes Go and a folder of a module that has it: %w", a.name, err)
	}
	return path, nil
}
