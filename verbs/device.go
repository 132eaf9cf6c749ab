// Package verbs opens RDMA devices and makes the objects that belong to no single queue pair: protection domains,
// completion queues and channels, address handles, asynchronous events. Memory is in package mr, queue pairs are in
// package qp, the specification's words in verbs/ib.
//
// # Lifetimes
//
// What has a Close must be closed, children before parents: a parent with children refuses with ErrBusy. Close can be
// called again; everything else on a closed object answers with an error that matches net.ErrClosed. An object that is
// dropped without Close is reported through log/slog when the garbage collector finds it, and what it stands for stays
// allocated, because a device may still write to it.
//
// # Concurrency
//
// Every method of every type may be called from any goroutine. Poll, PostSend and PostRecv do not block and do not
// allocate; those of one queue take turns, so give each queue one goroutine if the rate matters.
package verbs

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/provider"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Tier orders devices for the automatic choice: lower is better.
type Tier uint8

const (
	TierHardware   Tier = Tier(driver.TierHardware)   // a NIC
	TierKernelSoft Tier = Tier(driver.TierKernelSoft) // Soft-RoCE or soft iWARP, in the kernel
	TierSoft       Tier = Tier(driver.TierSoft)       // the software NIC of this library, always there
)

func (t Tier) String() string {
	if t <= TierSoft {
		return driver.Tier(t).String()
	}
	return fmt.Sprintf("Tier(%d)", uint8(t))
}

// MarshalText writes the tier in words.
func (t Tier) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// DeviceInfo describes a device that need not be open.
type DeviceInfo struct {
	Name     string   `json:"name"`     // "mlx5_0", "rxe0", "soft0"
	Provider string   `json:"provider"` // "mlx5", "rxe", "soft"
	Tier     Tier     `json:"tier"`
	GUID     ib.GUID  `json:"guid"`
	NetDevs  []string `json:"netdevs,omitempty"` // net devices that its ports stand on
	// CharDevs are what a container needs to be given to use the device: the paths of its character devices, among them
	// those for subnet management (umadN, issmN), which only programs that do that need. Empty: it needs none.
	CharDevs []string `json:"chardevs,omitempty"`
}

func infoOf(d driver.Device) DeviceInfo {
	i := d.Info()
	return DeviceInfo{Name: i.Name, Provider: i.Provider, Tier: Tier(i.Tier), GUID: i.GUID, NetDevs: i.NetDevs, CharDevs: i.CharDevs}
}

// Devices lists the devices of all tiers, best first. It returns what was found even if the search of a provider
// failed; the error then names each that did. That there are no devices of a kind is no failure.
func Devices() ([]DeviceInfo, error) { return devices(provider.Table()) }

func devices(table []provider.Entry) ([]DeviceInfo, error) {
	var all []DeviceInfo
	var errs []error
	for _, p := range table {
		devs, err := p.Devices()
		if err != nil && !errors.Is(err, driver.ErrAbsent) {
			errs = append(errs, fmt.Errorf("provider %s: %w", p.Name(), err))
		}
		for _, d := range devs {
			all = append(all, infoOf(d))
		}
	}
	slices.SortStableFunc(all, func(a, b DeviceInfo) int { return int(a.Tier) - int(b.Tier) })
	return all, opErr("get_device_list", "", errors.Join(errs...))
}

// EnvDevice is the environment variable that decides for Open(""): the name of a device, or of a provider.
const EnvDevice = "RINGSIDE_DEVICE"

// A Choice is which device was opened, and why no better one.
type Choice struct {
	Device DeviceInfo `json:"device"`
	// Reason says why it is this one: named by the caller, by the environment, or the best that works.
	Reason string `json:"reason"`
	// Passed lists what is better but was not taken, best first. Empty if the device was named.
	Passed []Passed `json:"passed,omitempty"`
}

// Passed is something better than the chosen device, and why it was not taken.
type Passed struct {
	Tier     Tier   `json:"tier"`
	Provider string `json:"provider,omitempty"` // empty: a whole tier
	Device   string `json:"device,omitempty"`   // empty: a whole provider
	Reason   string `json:"reason"`
}

func (p Passed) String() string {
	switch {
	case p.Device != "":
		return fmt.Sprintf("%s (%s): %s", p.Device, p.Tier, p.Reason)
	case p.Provider != "":
		return fmt.Sprintf("provider %s (%s): %s", p.Provider, p.Tier, p.Reason)
	}
	return fmt.Sprintf("%s: %s", p.Tier, p.Reason)
}

// String is one line: "soft0 (software NIC): the best device that works; not hardware: ...".
func (c Choice) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s (%s): %s", c.Device.Name, c.Device.Tier, c.Reason)
	for _, p := range c.Passed {
		fmt.Fprintf(&s, "; not %s", p)
	}
	return s.String()
}

// Open opens a device by name, or with an empty name the best one that works: hardware with an active port, then
// the kernel's software devices, then the software NIC; the environment variable RINGSIDE_DEVICE, if it is set,
// decides instead. What was chosen, and why nothing better, can be read from Choice.
func Open(name string) (*Context, error) {
	return open(provider.Table(), name, os.Getenv(EnvDevice))
}

func open(table []provider.Entry, name, env string) (*Context, error) {
	reason := "named by the caller"
	if name == "" && env != "" {
		name, reason = env, EnvDevice+"="+env
	}
	if name != "" {
		return openNamed(table, name, reason)
	}
	return openBest(table)
}

func openNamed(table []provider.Entry, name, reason string) (*Context, error) {
	var names []string
	var errs []error
	var byProvider driver.Device
	for _, p := range table {
		devs, err := p.Devices()
		if err != nil {
			errs = append(errs, fmt.Errorf("provider %s: %w", p.Name(), err))
		}
		for _, d := range devs {
			if d.Info().Name == name {
				return openDevice(d, Choice{Reason: reason})
			}
			if byProvider == nil && p.Name() == name {
				byProvider = d
			}
			names = append(names, d.Info().Name)
		}
	}
	if byProvider != nil {
		return openDevice(byProvider, Choice{Reason: reason + ", first device of that provider"})
	}
	have := "there are none"
	if len(names) > 0 {
		have = "there are " + strings.Join(names, ", ")
	}
	err := fmt.Errorf("%w (%s; %s)", ErrNoDevice, reason, have)
	return nil, opErr("open_device", name, errors.Join(append([]error{err}, errs...)...))
}

// ErrNoDevice: no device has that name, or none can be opened.
var ErrNoDevice = errors.New("no such device")

func openBest(table []provider.Entry) (*Context, error) {
	var passed []Passed
	for tier := TierHardware; tier <= TierSoft; tier++ {
		known := false
		for _, p := range table {
			if Tier(p.Tier) != tier {
				continue
			}
			known = true
			devs, err := p.Devices()
			if err != nil {
				passed = append(passed, Passed{Tier: tier, Provider: p.Name(), Reason: err.Error()})
			} else if len(devs) == 0 {
				passed = append(passed, Passed{Tier: tier, Provider: p.Name(), Reason: driver.ErrAbsent.Error()})
			}
			for _, d := range devs {
				c, err := openDevice(d, Choice{Reason: "the best device that works"})
				if err == nil {
					if err = c.usable(); err == nil {
						c.choice.Passed = passed
						return c, nil
					}
					c.Close()
				}
				passed = append(passed, Passed{Tier: tier, Provider: p.Name(), Device: d.Info().Name, Reason: err.Error()})
			}
		}
		if !known {
			passed = append(passed, Passed{Tier: tier, Reason: "this build has no provider for such devices"})
		}
	}
	errs := []error{ErrNoDevice}
	for _, p := range passed {
		errs = append(errs, errors.New(p.String()))
	}
	return nil, opErr("open_device", "", errors.Join(errs...))
}

// OpenDriver opens a device that is not in the table of providers: a fake one. Only packages of this module can make
// one.
func OpenDriver(d driver.Device) (*Context, error) {
	return openDevice(d, Choice{Reason: "given by the caller"})
}
