package mlx5emu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Config describes a device. The zero value is a device as a current kernel shows it.
type Config struct {
	// Name is the device's, by default "mlx5_0".
	Name string
	// StaticUARs makes it the device of a kernel that has no UAR objects: UAR pages are made with the context, and mapped by
	// their number.
	StaticUARs bool
	// Numbered gives QPs, keys and CQEs predictable numbers, the same in each run: QPNs from 0x100 on, keys 0x1842, 0x1942 and so
	// on, and time that counts completions. Peers should then be of this device.
	Numbered bool
	// HostOnly leaves the host's addresses out of the GID table: peers are then met through memory only. Without it, of several devices
	// on a host only the first can be reached at an address from elsewhere, since only one can have UDP port 4791 there.
	HostOnly bool
	// InfiniBand makes it a device of that link layer. Its peers are the process's other InfiniBand devices, by LID, and whoever is met
	// through memory, by GID.
	InfiniBand bool
	// L2Inline makes it a device that wants the first 18 bytes of an Ethernet frame in the WQE, as ConnectX-4 does.
	L2Inline bool
	// Faults are what happens to packets that come in over UDP, as softnic.EnvFaults says it; empty: what the environment says.
	Faults string
	// Manual leaves the data path to whoever calls Step. By default a goroutine does.
	Manual bool
	// Trace, if it is not nil, gets a line of text for each doorbell, WQE and CQE. Its Write is called with locks held.
	Trace io.Writer
}

// A Device is an emulated ConnectX. It is safe for concurrent use.
type Device struct {
	cfg   Config
	nic   *softnic.NIC
	attr  ib.DeviceAttr
	guid  ib.GUID
	began time.Time
	lid   ib.LID // of an InfiniBand device; constant
	gid   ib.GID // likewise

	gidsChanged chan struct{}

	// mu guards all that follows, and what is in contexts and objects unless it says otherwise. It may be held while the
	// software NIC is called, but not where that waits for a peer: the change of a QP's state, and the end of an object.
	mu       sync.Mutex
	closed   bool
	order    []*Context // in the order they were opened
	clock    uint64     // of a numbered device: counts CQEs
	nextPDN  uint32
	nextCQN  uint32
	nextSRQN uint32
	nextRaw  uint32     // counts queues of raw packet queue pairs
	numbers  *keySource // of a numbered device
	keys     keyTable
	windows  map[uint32]*mw // windows, by the upper 24 bits of their key
	qps      map[uint32]*qp // by number, but for raw packet queue pairs
	flows    []*flow        // in the order in which they are looked at
	inbox    inbox          // has a lock of its own
	told     told           // likewise
	engine   engine
}

// ErrClosed is the error of a device that was closed.
var ErrClosed = driver.ErrClosed

// NewDevice makes a device.
func NewDevice(cfg Config) (*Device, error) {
	if cfg.Name == "" {
		cfg.Name = "mlx5_0"
	}
	cfg.HostOnly = cfg.HostOnly || cfg.InfiniBand
	if n := os.Getpagesize(); n != pageSize { // arm64's kernels may be built for 16 or 64 KiB
		return nil, fmt.Errorf("mlx5emu: %s has UAR pages of %d bytes, and this kernel pages of %d: %w", cfg.Name, pageSize, n, errors.ErrUnsupported)
	}
	nic, keys, err := openNIC(cfg.Numbered)
	if err != nil {
		return nil, fmt.Errorf("mlx5emu: the software NIC behind %s: %w", cfg.Name, err)
	}
	if cfg.Faults != "" {
		if err := nic.SetFaults(cfg.Faults); err != nil {
			return nil, errors.Join(err, nic.Close())
		}
	}
	attr, err := nic.QueryDevice()
	if err != nil {
		return nil, errors.Join(err, nic.Close())
	}
	d := &Device{cfg: cfg, nic: nic, attr: attr, guid: attr.NodeGUID, began: time.Now(), numbers: keys, gidsChanged: make(chan struct{}, 1),
		windows: map[uint32]*mw{}, qps: map[uint32]*qp{}}
	if cfg.Numbered {
		d.guid = numberedGUID
	}
	if cfg.InfiniBand {
		if err := d.joinSubnet(); err != nil {
			return nil, errors.Join(err, nic.Close())
		}
	}
	d.register()
	d.start()
	return d, nil
}

// Name is the device's name.
func (d *Device) Name() string { return d.cfg.Name }

// Close ends the device, with all contexts that are still open. It may be called again.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	open := slices.Clone(d.order)
	d.mu.Unlock()
	d.stop()
	d.unregister()
	d.leaveSubnet()
	for _, c := range open {
		c.Close()
	}
	return d.nic.Close()
}
