package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
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

const busyBefore = "cores busy with other things before"

// busyCores returns how many cores were busy on average over the next d, or a negative number if that cannot be known.
func busyCores(d time.Duration) float64 {
	before, ok1 := busyTicks()
	time.Sleep(d)
	after, ok2 := busyTicks()
	if !ok1 || !ok2 {
		return -1
	}
	const ticksPerSecond = 100 // USER_HZ, the same on every Linux that Go runs on
	return float64(after-before) / ticksPerSecond / d.Seconds()
}

// busyTicks is the time that all processors together have not been idle since boot.
func busyTicks() (busy int64, ok bool) {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line) // cpu user nice system idle iowait irq softirq steal guest guest_nice
	if len(f) < 9 || f[0] != "cpu" {
		return 0, false
	}
	for _, i := range []int{1, 2, 3, 6, 7, 8} {
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return 0, false
		}
		busy += n
	}
	return busy, true
}

// profileUse says whether this program, and with it grpc-go, was built along a profile.
func profileUse() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "-pgo" && s.Value != "" && s.Value != "off" {
				return "built along a profile of both systems"
			}
		}
	}
	return "built without a profile"
}

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
	c.set("Go", runtime.Version()+", "+profileUse())
	c.set("ringside", revision())
	c.set("grpc-go", moduleVersion("google.golang.org/grpc"))
	c.set("UCX", ucxVersion())
	c.set("rounds", fmt.Sprint(cfg.rounds))
	c.set(busyBefore, fmt.Sprintf("%.2f", busyCores(2*time.Second)))
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
