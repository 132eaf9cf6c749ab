package softnic

import (
	"encoding/binary"
	"errors"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

const (
	helloMagic  = "ringside soft 1\n"
	helloSize   = 16 + 4*4 + 2*8 + 3*16
	helloFences = 1 << 0 // the sender cannot issue asymmetric barriers
)

// hello is what NICs of different processes tell each other first.
type hello struct {
	flags        uint32
	uid          uint32
	pid          uint32
	pidNS, mntNS uint64 // inode numbers of the namespaces
	boot         [16]byte
	from, to     ib.GID
}

func (h *hello) encode() []byte {
	le := binary.LittleEndian
	b := append(make([]byte, 0, helloSize), helloMagic...)
	for _, v := range [...]uint32{h.flags, h.uid, h.pid, 0} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint64(b, h.pidNS)
	b = le.AppendUint64(b, h.mntNS)
	b = append(b, h.boot[:]...)
	b = append(b, h.from[:]...)
	return append(b, h.to[:]...)
}

func (h *hello) decode(b []byte) error {
	if len(b) != helloSize || string(b[:16]) != helloMagic {
		return errors.New("no greeting of a software NIC of this version")
	}
	le := binary.LittleEndian
	*h = hello{flags: le.Uint32(b[16:]), uid: le.Uint32(b[20:]), pid: le.Uint32(b[24:]), pidNS: le.Uint64(b[32:]), mntNS: le.Uint64(b[40:])}
	copy(h.boot[:], b[48:])
	copy(h.from[:], b[64:])
	copy(h.to[:], b[80:])
	return nil
}
