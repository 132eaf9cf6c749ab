package transport

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
)

// Config describes how a Listener or Dial makes connections. A nil Config, and zero fields, mean the defaults. It is
// not changed, and may be shared.
type Config struct {
	// Device is the name of the device to open for this listener or connection; "" lets verbs.Open choose. Context, if
	// set, is used instead, and stays the caller's to close. Poller wins over both.
	Device  string
	Context *verbs.Context
	// Poller drives the connections. If nil, the Listener or the dialled Conn makes one with PollMode, and closes it
	// when the last connection that it drives, and the listener, are closed.
	Poller   *Poller
	PollMode PollMode // of a poller made here; default Adaptive

	// MaxMessage is the longest message in bytes; the smaller of both peers' counts. Default 16 MiB; at most 1 GiB, and not more than
	// the memory that Poller has for such messages, PollerConfig.BufferLimit, which also bounds the default.
	MaxMessage int
	// EagerSize is the payload in bytes of a receive slot: longer messages go by rendezvous. Default 8 KiB, 1 KiB with
	// SharedReceive; 256 B to 1 MiB.
	EagerSize int
	SendDepth int // messages allocated, queued or in flight towards the peer; default 128, 32 with SharedReceive
	RecvDepth int // messages that the peer may have on the way or undelivered here, or it loses its connection; default 128, 16 with SharedReceive
	// RendezvousDepth is the number of long messages in flight towards the peer; default 8, 2 with SharedReceive.
	RendezvousDepth int
	// SharedReceive takes receive slots from the poller's shared receive queue: an idle connection costs RecvDepth
	// small slots and no send memory.
	SharedReceive bool

	// Path is how software NICs are to meet; other devices have one path, and refuse all but PathAny. It counts for both sides: if one
	// wants PathUDP or PathTCP, the other's PathAny follows.
	Path Path

	HandshakeTimeout time.Duration // of each handshake; default 5 s
	MaxHandshakes    int           // a listener's handshakes in progress; default 64
	Linger           time.Duration // how long Close waits for messages accepted earlier to go out; default 5 s
	Name             string        // told to the peer; at most 255 bytes
	PrivateData      []byte        // told to the peer; at most 4096 bytes

	// TLS will protect the bootstrap connection. It is not implemented yet: a Config that sets it is refused.
	TLS *tls.Config
}

// A Path is a way for two software NICs to meet.
type Path string

const (
	PathAny    Path = ""       // memory if the peers can share it, else UDP, else TCP; or what the environment's RINGSIDE_PATH says
	PathMemory Path = "memory" // within a process, or shared between processes of one user on one host; or not at all
	PathUDP    Path = "udp"    // RoCEv2 over UDP, from the address that the bootstrap connection has
	PathTCP    Path = "tcp"    // a TCP connection for each queue pair, to the address that the bootstrap connection has gone to
)

const (
	defaultMaxMessage = 16 << 20
	maxMaxMessage     = 1 << 30
	minEager          = 256
	maxEager          = 1 << 20
	maxDepth          = 16384
	maxPrivateData    = 4096
	maxName           = 255
)

func orDefault(v *int, d int) {
	if *v == 0 {
		*v = d
	}
}

// populate returns a checked copy of cfg with the defaults filled in.
func (cfg *Config) populate() (*Config, error) {
	c := Config{}
	if cfg != nil {
		c = *cfg
	}
	if c.TLS != nil {
		return nil, fmt.Errorf("transport: Config.TLS: %w: TLS on the bootstrap connection is not implemented; "+
			"leave it nil and keep the listener on a trusted network", errors.ErrUnsupported)
	}
	if c.Path == PathAny {
		c.Path = Path(os.Getenv("RINGSIDE_PATH"))
	}
	switch c.Path {
	case PathAny, PathMemory, PathUDP, PathTCP:
	default:
		return nil, fmt.Errorf("transport: Config.Path (or RINGSIDE_PATH) is %q: want %q, %q, %q, or nothing for whichever is best", c.Path, PathMemory, PathUDP, PathTCP)
	}
	largest := maxMaxMessage
	if c.Poller != nil { // else there will be one that can hold any
		largest = c.Poller.pool.MaxBuffer()
	}
	orDefault(&c.MaxMessage, min(defaultMaxMessage, largest))
	if c.MaxMessage > largest && c.MaxMessage <= maxMaxMessage {
		return nil, fmt.Errorf("transport: Config.MaxMessage is %d, and the memory of Config.Poller holds messages of %d bytes: raise its BufferLimit", c.MaxMessage, largest)
	}
	orDefault(&c.MaxHandshakes, 64)
	if c.SharedReceive {
		orDefault(&c.SendDepth, 32)
		orDefault(&c.EagerSize, 1024)
		orDefault(&c.RecvDepth, 16)
		orDefault(&c.RendezvousDepth, 2)
	} else {
		orDefault(&c.SendDepth, 128)
		orDefault(&c.EagerSize, 8192)
		orDefault(&c.RecvDepth, 128)
		orDefault(&c.RendezvousDepth, 8)
	}
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = 5 * time.Second
	}
	if c.Linger == 0 {
		c.Linger = 5 * time.Second
	}
	for _, f := range []struct {
		name      string
		v, lo, hi int
	}{
		{"MaxMessage", c.MaxMessage, 1, maxMaxMessage},
		{"EagerSize", c.EagerSize, minEager, maxEager},
		{"SendDepth", c.SendDepth, 2, maxDepth},
		{"RecvDepth", c.RecvDepth, 2, maxDepth},
		{"RendezvousDepth", c.RendezvousDepth, 1, 256},
		{"MaxHandshakes", c.MaxHandshakes, 1, 1 << 16},
		{"Name", len(c.Name), 0, maxName},
		{"PrivateData", len(c.PrivateData), 0, maxPrivateData},
	} {
		if f.v < f.lo || f.v > f.hi {
			return nil, fmt.Errorf("transport: Config.%s is %d, want %d to %d", f.name, f.v, f.lo, f.hi)
		}
	}
	if c.HandshakeTimeout < 0 || c.Linger < 0 {
		return nil, errors.New("transport: Config: negative duration")
	}
	return &c, nil
}
