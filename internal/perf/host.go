package perf

import (
	"os"
	"runtime"
	"runtime/debug"
	"time"
)

// Host says on what one side of a measurement ran: the conditions without which a number means nothing.
type Host struct {
	Name       string `json:"host"`       // host name
	OS         string `json:"os"`         // GOOS
	Arch       string `json:"arch"`       // GOARCH
	Kernel     string `json:"kernel"`     // kernel release
	CPU        string `json:"cpu"`        // processor model
	Cores      int    `json:"cores"`      // processors that the process may use
	GOMAXPROCS int    `json:"gomaxprocs"` //
	PollCPU    int    `json:"poll_cpu"`   // processor that the measuring thread is pinned to, or -1
	Go         string `json:"go"`         // Go release
	Version    string `json:"ringside"`   // module version
	Device     string `json:"device"`     // RDMA device
	Provider   string `json:"provider"`   // its provider
	Tier       string `json:"tier"`       // its tier
}

// ThisHost returns the conditions of this process, with the device left out.
func ThisHost() Host {
	name, err := os.Hostname()
	if err != nil {
		name = "unknown"
	}
	return Host{
		Name:       name,
		OS:         runtime.GOOS,
		Arch:       runtime.GOARCH,
		Kernel:     kernelRelease(),
		CPU:        cpuModel(),
		Cores:      runtime.NumCPU(),
		GOMAXPROCS: runtime.GOMAXPROCS(0),
		PollCPU:    -1,
		Go:         runtime.Version(),
		Version:    moduleVersion(),
	}
}

// moduleVersion is the version of this module as the build recorded it.
func moduleVersion() string {
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	const path = "github.com/ringside-rdma/ringside"
	if bi.Main.Path == path {
		return bi.Main.Version
	}
	for _, m := range bi.Deps {
		if m.Path == path {
			return m.Version
		}
	}
	return "unknown"
}

// cpuTime is CPU time that a process has used, on all its threads.
type cpuTime struct {
	user, system time.Duration
}

func (c cpuTime) sub(d cpuTime) cpuTime { return cpuTime{c.user - d.user, c.system - d.system} }
func (c cpuTime) total() time.Duration  { return c.user + c.system }
