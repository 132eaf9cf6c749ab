package observe

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
)

// A Record is a packet as it goes through the ring. The fields up to Data are a NIC's claims.
type Record struct {
	Time    int64 // nanoseconds since 1970
	Out     bool  // it left the NIC; else it came
	Path    Path
	Again   wire.Reason // why it was sent again
	Verdict Verdict     // what became of it
	Marked  bool        // it has met congestion, which its bytes do not say: an ECN mark, or the socket's buffer was filling up
	QPN     uint32      // the NIC's queue pair, and the other one; 0: unknown
	PeerQPN uint32
	Src     netip.AddrPort
	Dst     netip.AddrPort
	IP      roce.IP // its traffic class and hop limit, as far as they are known
	Length  int     // bytes of the whole packet: from the BTH to the invariant CRC
	// Data is the start of the packet. That of one that was never on a wire lacks the invariant CRC.
	Data []byte
}

// A Path is how a packet went, or would have gone.
type Path uint8

const (
	UDP    Path = iota // it is a packet
	Shm                // the operation was done through shared memory
	Inproc             // it was done within the process
	paths
)

func (p Path) String() string { return [...]string{"udp", "shm", "inproc"}[min(p, Inproc)] }

const (
	// RecordLen is the length of a record without Data.
	RecordLen = 72
	// MaxData is the length of the longest packet: what UDP can carry.
	MaxData = 1<<16 - 1 - 8 - 20

	recordPacket = 1
	recordPad    = 2      // what fills the ring's end
	recordOut    = 1 << 7 // bits of the path
	recordMarked = 1 << 6
)

// A record is, little-endian, its length (a multiple of 8), its kind, path, reason and verdict; the time; both queue pairs; the
// lengths of the packet and of Data; both ports, traffic class, hop limit, 2 bytes of nothing; both addresses, IPv4 ones mapped to IPv6; and Data.

var errRecord = errors.New("the software NIC has written a record that makes no sense")

// recordSize is how much of the ring a record takes with n bytes of Data.
func recordSize(n int) int { return (RecordLen + n + 7) &^ 7 }

// put writes all but Data, of n bytes, to b, which is as long as the record is.
func (r *Record) put(b []byte, n int) {
	le := binary.LittleEndian
	path := byte(r.Path)
	if r.Out {
		path |= recordOut
	}
	if r.Marked {
		path |= recordMarked
	}
	le.PutUint32(b, uint32(len(b)))
	b[4], b[5], b[6], b[7] = recordPacket, path, byte(r.Again), byte(r.Verdict)
	le.PutUint64(b[8:], uint64(r.Time))
	le.PutUint32(b[16:], r.QPN)
	le.PutUint32(b[20:], r.PeerQPN)
	le.PutUint32(b[24:], uint32(r.Length))
	le.PutUint32(b[28:], uint32(n))
	le.PutUint16(b[32:], r.Src.Port())
	le.PutUint16(b[34:], r.Dst.Port())
	b[36], b[37], b[38], b[39] = r.IP.Class, r.IP.Hops, 0, 0
	src, dst := r.Src.Addr().As16(), r.Dst.Addr().As16()
	copy(b[40:], src[:])
	copy(b[56:], dst[:])
}

// Decode reads a record, of which Data then is a part. All of it is checked, as far as it can be without knowing the NIC.
func (r *Record) Decode(b []byte) error {
	if len(b) < RecordLen || b[4] != recordPacket {
		return errRecord
	}
	le := binary.LittleEndian
	length, n := le.Uint32(b[24:]), le.Uint32(b[28:])
	d := Record{Time: int64(le.Uint64(b[8:])), Out: b[5]&recordOut != 0, Marked: b[5]&recordMarked != 0, Path: Path(b[5] &^ (recordOut | recordMarked)), Again: wire.Reason(b[6]), Verdict: Verdict(b[7]),
		QPN: le.Uint32(b[16:]), PeerQPN: le.Uint32(b[20:]), IP: roce.IP{Class: b[36], Hops: b[37]}}
	d.Src = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[40:])).Unmap(), le.Uint16(b[32:]))
	d.Dst = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[56:])).Unmap(), le.Uint16(b[34:]))
	switch {
	case length > MaxData, n > length, recordSize(int(n)) != len(b), le.Uint32(b) != uint32(len(b)):
		return errRecord
	case d.Path >= paths, d.Again >= wire.Reasons, d.Verdict >= Verdicts, d.QPN > maxQPN, d.PeerQPN > maxQPN, d.Time < 0:
		return errRecord
	case d.Src.Addr().Is4() != d.Dst.Addr().Is4():
		return errRecord
	case d.Path != UDP && int(n) > int(length)-roce.ICRCLen:
		return errRecord // what was not on a wire has no invariant CRC
	}
	d.Length, d.Data = int(length), b[RecordLen:RecordLen+n]
	*r = d
	return nil
}

const maxQPN = 1<<24 - 1
