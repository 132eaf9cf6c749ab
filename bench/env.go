package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// conditions are what the numbers depend on, in the order of the report.
type conditions struct{ names, texts []string }

func (c *conditions) set(name, text string) {
	c.names = append(c.names, name)
	c.texts = append(c.texts, text)
}

// get returns the text of a condition, or "".
func (c *conditions) get(name string) string {
	if i := slices.Index(c.names, name); i >= 0 {
		return c.texts[i]
	}
	return ""
}

const loadBefore = "load average before"

func hostConditions(cfg *config) *conditions {
	c := new(conditions)
	c.set("date", time.Now().UTC().Format("2006-01-02 15:04 MST"))
	c.set("CPU", fmt.Sprintf("%s, %d cores", cpuModel(), runtime.NumCPU()))
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		c.set("kernel", unix.ByteSliceToString(u.Sysname[:])+" "+unix.ByteSliceToString(u.Release[:])+" "+unix.ByteSliceToString(u.Machine[:]))
	}
	if flags := cpuInfo("flags"); strings.Contains(" "+flags+" ", " hypervisor ") {
		c.set("machine", "a virtual one: its neighbours show in the spread")
	}
	c.set("huge pages for shared memory", fileLine("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
	c.set("Go", runtime.Version())
	c.set("ringside", revision())
	c.set("grpc-go", moduleVersion("google.golang.org/grpc"))
	c.set("UCX", ucxVersion())
	c.set("rounds", fmt.Sprint(cfg.rounds))
	c.set(loadBefore, loadAverage())
	return c
}

func cpuInfo(field string) string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == field {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func cpuModel() string {
	if m := cpuInfo("model name"); m != "" {
		return m
	}
	return runtime.GOARCH
}

func fileLine(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// loadAverage is that of the last minute. Under a benchmark it is about the number of its busy processes; what matters
// is how much more there is.
func loadAverage() string {
	one, _, _ := strings.Cut(fileLine("/proc/loadavg"), " ")
	return one
}

// revision is the commit that is checked out, and whether the tree differs from it.
func revision() string {
	head, err := exec.Command("git", "rev-parse", "--short=12", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	rev := strings.TrimSpace(string(head))
	if out, err := exec.Command("git", "status", "--porcelain", "--untracked-files=no").Output(); err == nil && len(out) > 0 {
		rev += ", modified"
	}
	return rev
}

func moduleVersion(path string) string {
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, m := range bi.Deps {
			if m.Path == path {
				return m.Version
			}
		}
	}
	return "unknown"
}
