package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strconv"
	"strings"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// perftest's sides tell each other over TCP, the client first each time:
//
//	version         16 bytes, of which a NUL ends the text
//	cycle, line     4 bytes each, big endian: how much memory small messages go through, and how far apart they are
//	MTU             2 bytes: a digit, 1 to 5, and a NUL
//	keys            108 bytes, several times: where the queue pair and the memory are. All but the first say only that a side
//	                has come so far
//	report          five times 8 bytes, big endian (bandwidth of WRITE, READ and atomics): bytes, count, and three doubles
//	"done"          5 bytes, which nobody reads
//
// The programs read each by one read(2), so each is written at once.
const (
	perftestVersionLen = 16
	keysLen            = 108
	keysFields         = "%04x:%04x:%06x:%06x:%08x:%016x:" // LID, READs in flight, QPN, PSN, rkey, address; then the GID, and the SRQ's number
)

// perftestVersion is of what this is compatible with: Debian 12's perftest says that of itself.
const perftestVersion = "6.06"

// A perftestTalk is the TCP connection.
type perftestTalk struct {
	conn   net.Conn
	client bool
}

// exchange sends mine, and fills theirs with what the peer sends.
func (t perftestTalk) exchange(mine, theirs []byte) error {
	if t.client {
		if _, err := t.conn.Write(mine); err != nil {
			return err
		}
	}
	if _, err := io.ReadFull(t.conn, theirs); err != nil {
		return fmt.Errorf("waiting for the peer: %w", err)
	}
	if !t.client {
		if _, err := t.conn.Write(mine); err != nil {
			return err
		}
	}
	return nil
}

// A perftestIntro is what both sides must agree on before anything else.
type perftestIntro struct {
	cycle, line int // bytes
	mtu         ib.MTU
}

// introduce returns what both have agreed on: the larger cycle and line, and the smaller MTU.
func (t perftestTalk) introduce(mine perftestIntro) (perftestIntro, error) {
	var version [perftestVersionLen]byte
	own := make([]byte, perftestVersionLen)
	copy(own, perftestVersion)
	if err := t.exchange(own, version[:]); err != nil {
		return perftestIntro{}, err
	}
	if err := checkPerftestVersion(version[:]); err != nil {
		return perftestIntro{}, err
	}
	agreed := mine
	for _, v := range []*int{&agreed.cycle, &agreed.line} {
		var theirs [4]byte
		if err := t.exchange(binary.BigEndian.AppendUint32(nil, uint32(*v)), theirs[:]); err != nil {
			return perftestIntro{}, err
		}
		n := binary.BigEndian.Uint32(theirs[:])
		if n == 0 || n > 1<<20 || n&(n-1) != 0 {
			return perftestIntro{}, fmt.Errorf("the peer's pages or cache lines have %d bytes", n)
		}
		*v = max(*v, int(n))
	}
	if agreed.line > agreed.cycle {
		return perftestIntro{}, fmt.Errorf("cache lines of %d bytes: the pages have only %d", agreed.line, agreed.cycle)
	}
	var theirs [2]byte
	if err := t.exchange([]byte{'0' + byte(mine.mtu), 0}, theirs[:]); err != nil {
		return perftestIntro{}, err
	}
	mtu := ib.MTU(theirs[0] - '0')
	if mtu < ib.MTU256 || mtu > ib.MTU4096 {
		return perftestIntro{}, fmt.Errorf("the peer's MTU is %q; there are 1 to 5", theirs)
	}
	agreed.mtu = min(mine.mtu, mtu)
	return agreed, nil
}

// checkPerftestVersion takes the versions that meet like this one.
func checkPerftestVersion(b []byte) error {
	text, _, ok := bytes.Cut(b, []byte{0})
	v, err := strconv.ParseFloat(string(text), 64)
	if !ok || err != nil || v < 5.7 || v >= 7 {
		return fmt.Errorf("the peer is perftest %q; 5.70 to 6 are understood (Debian 12 has %s)", text, perftestVersion)
	}
	return nil
}

// perftestKeys are where a queue pair and its memory are.
type perftestKeys struct {
	at     qp.Endpoint
	reads  int // RDMA READs and atomics that it takes at a time
	window mr.RemoteKey
}

func (k perftestKeys) encode() []byte {
	b := fmt.Appendf(make([]byte, 0, keysLen), keysFields, uint16(k.at.LID), uint16(k.reads), uint32(k.at.QPN), uint32(k.at.PSN),
		uint32(k.window.RKey), k.window.Addr)
	for _, g := range k.at.GID {
		b = fmt.Appendf(b, "%02x:", g)
	}
	b = fmt.Appendf(b, "%08x:", 0)
	return append(b, make([]byte, keysLen-len(b))...)
}

var errKeys = errors.New("not keys as perftest sends them")

// decodeKeys is the reverse of encode. b comes from the peer and may be anything. The window's length is not known.
func decodeKeys(b []byte) (k perftestKeys, err error) {
	fields := strings.Split(strings.TrimRight(string(b), "\x00"), ":")
	widths := []int{4, 4, 6, 6, 8, 16, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 8, 0}
	if len(b) != keysLen || len(fields) != len(widths) {
		return k, fmt.Errorf("%w: %q", errKeys, b)
	}
	var v [8]uint64
	for i, f := range fields {
		if len(f) != widths[i] {
			return k, fmt.Errorf("%w: %q", errKeys, b)
		}
		if i < 6 {
			if v[i], err = strconv.ParseUint(f, 16, 64); err != nil {
				return k, fmt.Errorf("%w: %q", errKeys, b)
			}
		}
	}
	gid, err := hex.DecodeString(strings.Join(fields[6:22], ""))
	if err != nil {
		return k, fmt.Errorf("%w: %q", errKeys, b)
	}
	copy(k.at.GID[:], gid)
	k.at.LID, k.at.QPN, k.at.PSN = ib.LID(v[0]), ib.QPN(v[2]), ib.PSN(v[3])
	k.reads, k.window.RKey, k.window.Addr = int(v[1]), ib.RKey(v[4]), v[5]
	return k, nil
}

// keys sends mine, and returns the peer's.
func (t perftestTalk) keys(mine perftestKeys) (perftestKeys, error) {
	var theirs [keysLen]byte
	if err := t.exchange(mine.encode(), theirs[:]); err != nil {
		return perftestKeys{}, err
	}
	return decodeKeys(theirs[:])
}

// A perftestReport is what the sides of a bandwidth test tell each other. The C program's server, which has nothing to say, sends
// what its memory happens to hold.
type perftestReport struct {
	size  uint64
	iters uint64
	peak  float64 // MB/s of 2^20 bytes; the next too
	avg   float64
	rate  float64 // 10^6 messages a second
}

// report sends mine, and returns the peer's.
func (t perftestTalk) report(mine perftestReport) (theirs perftestReport, err error) {
	own := [...]uint64{mine.size, mine.iters, math.Float64bits(mine.peak), math.Float64bits(mine.avg), math.Float64bits(mine.rate)}
	var got [len(own)]uint64
	for i, v := range own {
		var b [8]byte
		if err := t.exchange(binary.BigEndian.AppendUint64(nil, v), b[:]); err != nil {
			return theirs, err
		}
		got[i] = binary.BigEndian.Uint64(b[:])
	}
	return perftestReport{got[0], got[1], math.Float64frombits(got[2]), math.Float64frombits(got[3]), math.Float64frombits(got[4])}, nil
}

// bye ends the meeting. The peer may have closed already.
func (t perftestTalk) bye() { io.WriteString(t.conn, "done\x00") }
