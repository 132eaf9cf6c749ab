package softnic

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// EnvFaults names the environment variable that has a NIC receive as over a bad network, for tests of what is built on it:
//
//	RINGSIDE_SOFT_FAULTS=loss=1%,duplicate=1%,reorder=5%,seed=7
//
// Each packet that comes from a network is lost, comes twice, or comes after some of those behind it, with these probabilities,
// by a generator with this seed (default 1). Only the refusal of a request is always heard: it is sent once, since it ends the
// connection, and a requester that does not hear it says that the peer does not answer. Memory paths have no packets, and no faults.
const EnvFaults = "RINGSIDE_SOFT_FAULTS"

// faults are what happens to packets between the socket and a port. Guarded by the port's mu.
type faults struct {
	loss, duplicate, reorder float64
	rnd                      *rand.Rand
	held                     []heldPacket // that come later
	came                     []byte       // the one of these that comes now; nil: none
	free                     [][]byte
}

// maxHeld bounds how many packets are held back, and maxHold how many others come before one.
const (
	maxHeld = 64
	maxHold = 16
)

type heldPacket struct {
	pkt  roce.Packet
	came []byte // what it was decoded from
	src  netip.AddrPort
	left int // packets that come before it
}

// faultsOf returns what a text as EnvFaults has it asks for; nil: nothing.
func faultsOf(text string) (*faults, error) {
	if text == "" {
		return nil, nil
	}
	f := &faults{}
	seed := uint64(1)
	for _, part := range strings.Split(text, ",") {
		name, value, _ := strings.Cut(part, "=")
		var to *float64
		switch name {
		case "loss":
			to = &f.loss
		case "duplicate":
			to = &f.duplicate
		case "reorder":
			to = &f.reorder
		case "seed":
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s: seed %q is no number", EnvFaults, value)
			}
			seed = n
			continue
		default:
			return nil, fmt.Errorf("%s: %q is none of loss, duplicate, reorder and seed", EnvFaults, name)
		}
		v, ok := strings.CutSuffix(value, "%")
		p, err := strconv.ParseFloat(v, 64)
		if !ok || err != nil || !(p >= 0 && p <= 100) {
			return nil, fmt.Errorf("%s: %s=%q: want a percentage, such as 0.5%%", EnvFaults, name, value)
		}
		*to = p / 100
	}
	f.rnd = rand.New(rand.NewPCG(seed, 0))
	return f, nil
}

// SetFaults is EnvFaults for this NIC alone, whatever the environment says; the error is about the text. To be called before the NIC is
// used, and by one goroutine.
func (n *NIC) SetFaults(text string) error {
	if _, err := faultsOf(text); err != nil {
		return err
	}
	n.faults = &text
	return nil
}

// portFaults are what a port of the NIC begins with.
func (n *NIC) portFaults() (*faults, error) {
	if n.faults != nil {
		return faultsOf(*n.faults)
	}
	return faultsOf(os.Getenv(EnvFaults))
}

// pass hands on what becomes of a packet, which came as these bytes: nothing, itself, or itself and others.
func (f *faults) pass(src netip.AddrPort, pkt *roce.Packet, came []byte, to func(netip.AddrPort, *roce.Packet)) {
	switch x := f.rnd.Float64(); {
	case pkt.Opcode == roce.Op(roce.RC, roce.Acknowledge) && pkt.Syndrome.Status() != ib.WCSuccess:
		to(src, pkt)
	case x < f.loss:
	case x < f.loss+f.reorder && len(f.held) < maxHeld:
		h := heldPacket{pkt: *pkt, src: src, left: 1 + f.rnd.IntN(maxHold)}
		var b []byte
		if n := len(f.free); n > 0 {
			b, f.free = f.free[n-1], f.free[:n-1]
		}
		h.came = append(b[:0], came...)
		h.pkt.Payload = h.came[pkt.Opcode.HeaderLen():][:len(pkt.Payload)]
		f.held = append(f.held, h)
		return
	default:
		to(src, pkt)
		if f.rnd.Float64() < f.duplicate {
			to(src, pkt)
		}
	}
	f.late(false, to)
}

// late hands on the packets whose turn has come; all: those that are held back, because no others come.
func (f *faults) late(all bool, to func(netip.AddrPort, *roce.Packet)) {
	keep := f.held[:0]
	for i := range f.held {
		h := &f.held[i]
		if h.left--; h.left > 0 && !all {
			keep = append(keep, *h)
			continue
		}
		f.came = h.came
		to(h.src, &h.pkt)
		f.free = append(f.free, h.came)
	}
	f.came, f.held = nil, keep
}
