// Package wire is connections (RC and UC) as packets: what a queue pair sends of its requests and does with what it receives, as
// the InfiniBand specification orders it (volume 1, chapters 9.7 and 9.8). It neither knows sockets nor clocks: packets come
// and go through interfaces, and the time is an argument, so that a network of queue pairs can be run in virtual time and a
// run that failed be repeated exactly.
//
// A Requester sends requests, and takes acknowledgements and responses; a Responder executes requests, and answers them. A
// queue pair has one of each (UCRequester and UCResponder if it is unreliable). They are for one goroutine at a time, allocate
// nothing once they are made, and hold a bounded amount of state whatever the peer sends.
package wire

import (
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Config is what both sides of a connection are made with: the attributes of RTR and RTS.
type Config struct {
	DestQP uint32 // the peer's queue pair
	MTU    int    // of the path: bytes of payload a packet, a multiple of 4
	SQPSN  ib.PSN // of the first packet that is sent
	RQPSN  ib.PSN // of the first packet that is expected

	AckTimeout      time.Duration // 0: wait for ever
	RetryCount      uint8         // how many times in a row it is sent again before the peer is given up, 0 to 7
	RNRRetry        uint8         // the same for a peer that has no receive posted; ib.RNRRetryForever
	MinRNRTimer     ib.RNRTimer   // how long the peer is asked to wait
	MaxRdAtomic     int           // READs and atomics on their way, 0: there can be none
	MaxDestRdAtomic int           // and of the peer

	SendDepth int // requests that can be queued, a power of two
	Window    int // packets on their way; 0: defaultWindow, or selectiveWindow
	// Selective: both sides are this package's, and know it. What is lost is then sent again by itself, and not all that was sent
	// behind it: see selective.go.
	Selective bool
	Early     *EarlyPool // what it may keep meanwhile of what comes behind; nil: as much as one connection can have use for
	// Stream: the packets go through something that loses none, as long as it lasts. Nothing is sent again then but what the peer had no
	// receive for; AckTimeout and RetryCount are only how long a peer may say nothing (Config.silence).
	Stream bool
	// Congestion: the Requester slows down when the peer, or the network on the way to it, gets more than it can take: see congestion.go.
	Congestion bool
}

// defaultWindow is how many packets may be on their way. rxe has 128 as well (RXE_MAX_UNACKED_PSNS).
const defaultWindow = 128

// selectiveWindow is how many with Config.Selective: while one that was lost is sent again, others go on.
const selectiveWindow = 512

func (c *Config) fill() {
	switch {
	case c.Window != 0:
	case c.Selective:
		c.Window = selectiveWindow
	default:
		c.Window = defaultWindow
	}
}

// streamSilence is the least that a peer at the other end of a stream may say nothing: what holds the stream up, such as a packet of it
// that is sent again three times, is nothing that the peer can be blamed for.
const streamSilence = 2 * time.Second

// silence is how long the peer of a stream may say nothing; 0: for ever.
func (c *Config) silence() time.Duration {
	if c.AckTimeout == 0 {
		return 0
	}
	return max(c.AckTimeout*time.Duration(c.RetryCount+1), streamSilence)
}

// maxMessage is the length of the longest message (IBA 9.4.1).
const maxMessage = 1 << 31

// maxPackets is how many packets a message can have: PSNs are compared within half of their space (IBA 9.7.3.1).
const maxPackets = 1<<23 - 1

// An Output takes packets. Neither of its methods may call back.
type Output interface {
	// Packet returns n bytes to write the payload of a packet to that has the headers of p. Commit, which follows, sends it.
	// If false is returned, no packet can be sent now: whoever wanted to is to be pumped again when one can be.
	Packet(p *roce.Packet, n int) (payload []byte, ok bool)
	// Commit sends the packet. If the payload could not be written, Abort drops it.
	Commit()
	Abort()
}

// packets is how many packets n bytes take.
func packets(n uint32, mtu int) uint32 {
	if n == 0 {
		return 1
	}
	return uint32((uint64(n) + uint64(mtu) - 1) / uint64(mtu))
}

// distance is how far b is behind a, in packets; negative if it is before it (IBA 9.7.3.1).
func distance(a, b ib.PSN) int32 { return int32((b-a)<<8) >> 8 }
