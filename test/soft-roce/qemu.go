//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// A machineConfig is what a run wants of its machine.
type machineConfig struct {
	arch    *arch
	kernel  string // not compressed
	initrd  string
	socket  string // where the machine's port connects to
	work    string // shared for reading and writing
	out     string // likewise; empty: none
	memory  int    // MiB
	cpus    int
	kvm     bool
	verbose bool // let the kernel print more
}

// kernelOptions make the boot short: no probing, no self-tests, no mitigations in a machine that lives for one run, no security
// module (without apparmor it is selinux), and no clearing of memory that is written anyway. A panic ends the machine.
const kernelOptions = "panic=-1 nokaslr mitigations=off random.trust_cpu=on cryptomgr.notests audit=0 apparmor=0 selinux=0 " +
	"net.ifnames=0 init_on_alloc=0"

// qemuArgs is the machine's command line.
func qemuArgs(c machineConfig) []string {
	accel, cpu := "tcg,thread=multi,tb-size=256", c.arch.cpu
	if c.kvm {
		accel, cpu = "kvm", "host"
	}
	append_ := kernelOptions + " console=" + c.arch.console + " " + c.arch.options + " quiet loglevel=4"
	if c.verbose {
		append_ += " loglevel=6" // the last counts
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", c.arch.machine, "-accel", accel, "-cpu", cpu, "-smp", fmt.Sprint(c.cpus), "-m", fmt.Sprint(c.memory),
		"-kernel", c.kernel, "-initrd", c.initrd, "-append", append_,
		"-serial", "stdio",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=port,path=" + optionValue(c.socket),
		"-device", "virtserialport,chardev=port,name=" + guestPort,
	}
	share := func(tag, path, more string) {
		// remap: what the folder holds of other file systems would else have the same file numbers.
		args = append(args,
			"-fsdev", "local,id="+tag+",path="+optionValue(path)+",security_model=none,multidevs=remap"+more,
			"-device", "virtio-9p-pci,fsdev="+tag+",mount_tag="+tag)
	}
	share("host", "/", ",readonly=on")
	share("work", c.work, "")
	if c.out != "" {
		share("out", c.out, "")
	}
	return args
}

// optionValue writes a value for QEMU's lists of options, where a comma is written twice.
func optionValue(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// haveKVM is whether the processor can run machines, and we may. On amd64 a /dev/kvm alone says little: it is also there where the
// host is a machine itself and the processor's feature is hidden.
func (a *arch) haveKVM() bool {
	if a.foreign() {
		return false
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || a.name == "amd64" && !regexp.MustCompile(`(?m)^flags\s*:.*\b(vmx|svm)\b`).Match(info) {
		return false
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// writeInitrd appends to the image's initramfs what belongs to this run: this program as /init, and its configuration. The
// kernel unpacks archives that follow one another.
func writeInitrd(c machineConfig, base string, program []byte, config []byte) error {
	f, err := os.Create(c.initrd)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := os.Open(base)
	if err != nil {
		return err
	}
	defer b.Close()
	if _, err := f.ReadFrom(b); err != nil {
		return err
	}
	t := tree{}
	t.file("init", 0o755, program)
	t.file(strings.TrimPrefix(guestConfigFile, "/"), 0o644, config)
	t.device("dev/console", 0o600, 5, 1)
	for _, dir := range []string{"proc", "sys", "run", "layer", strings.TrimPrefix(guestHost, "/"), strings.TrimPrefix(guestRoot, "/")} {
		t.folder(filepath.Clean(dir))
	}
	t.folder(strings.TrimPrefix(guestHides, "/"))
	if c.arch.foreign() {
		hidePrograms(t, os.Getenv("PATH"))
	}
	if err := t.writeTo(f); err != nil {
		return err
	}
	return f.Close()
}

// hidePrograms hides the folders of the host's programs, and thereby tells the machine's commands that these are not there: it could not run
// them. What the image has in such folders is over that.
func hidePrograms(t tree, path string) {
	for _, dir := range append(filepath.SplitList(path), defaultPath...) {
		if dir, err := filepath.EvalSymlinks(dir); err == nil && filepath.IsAbs(dir) && dir != "/" {
			t.device(guestHides[1:]+dir, 0, 0, 0) // what an overlay takes as "nothing here, nor below"
		}
	}
}
