package softnic

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// head is a process that has a queue pair at an address, and sees the IP headers of its host's packets. It answers each line by one that
// begins with the line's first word.
func init() {
	testutil.RegisterChild("softnic.head", func([]string) {
		n, err := Open()
		if err != nil {
			childTB{}.Fatal(err)
		}
		h := &headHost{n: n}
		const all = 0x0300 // ETH_P_ALL, as it is on the network
		if h.raw, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all); err != nil {
			childTB{}.Fatal("AF_PACKET: ", err)
		}
		for line := range testutil.ChildInput() {
			word, rest, _ := strings.Cut(line, " ")
			fmt.Println(word+":", h.do(word, rest))
		}
	})
}

type headHost struct {
	n   *NIC
	raw int
	gid int
	e   *end
	to  ib.AHAttr
	qpn ib.QPN
}

// An ipSeen is what the host has sent or received.
type ipSeen struct {
	Out    bool
	Class  uint8
	Hops   uint8
	Opcode roce.Opcode
	header string // of IP, in hexadecimal
}

func (h *headHost) do(word, rest string) any {
	switch word {
	case "open": // type, address
		typ, addr, _ := strings.Cut(rest, " ")
		gids, err := h.n.GIDs(1)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(gids, func(g ib.GIDEntry) bool { return g.GID.Addr().String() == addr })
		if i < 0 {
			return "no such address"
		}
		h.gid = gids[i].Index
		p, err := h.n.netPortAt(h.gid)
		if err != nil {
			return err
		}
		if h.e != nil {
			h.e.close()
		}
		h.e = makeEnd(childTB{}, h.n, endConfig{typ: map[string]ib.QPType{"RC": ib.RC, "UC": ib.UC, "UD": ib.UD}[typ], size: 64 << 10})
		return fmt.Sprint(uint32(h.e.q.QPN()), " ", p.sock.Local().Port())
	case "join": // address, its queue pair and UDP port, traffic class, hop limit
		var addr string
		var qpn uint32
		h.to = ib.AHAttr{SGIDIndex: h.gid, Port: 1}
		if _, err := fmt.Sscan(rest, &addr, &qpn, &h.to.UDPPort, &h.to.TrafficClass, &h.to.HopLimit); err != nil {
			return err
		}
		h.to.DGID, h.qpn = ib.GIDFromAddr(netip.MustParseAddr(addr)), ib.QPN(qpn)
		e := h.e
		const conn = ib.AttrState | ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN
		rtr := ib.QPAttr{State: ib.RTR, AH: h.to, PathMTU: ib.MTU256, DestQPN: h.qpn, MaxDestRdAtomic: 4, MinRNRTimer: 1}
		rts := ib.QPAttr{State: ib.RTS, MaxRdAtomic: 4, AckTimeout: 18, RetryCount: 7, RNRRetry: 7}
		var err error
		switch e.q.(*QP).typ {
		case ib.UD:
			e.ready()
		case ib.UC:
			e.init()
			if err = e.q.Modify(e.t.Context(), &rtr, conn); err == nil {
				err = e.q.Modify(e.t.Context(), &rts, ib.AttrState|ib.AttrSQPSN)
			}
		default:
			e.init()
			if err = e.q.Modify(e.t.Context(), &rtr, conn|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer); err == nil {
				err = e.q.Modify(e.t.Context(), &rts, ib.AttrState|ib.AttrMaxRdAtomic|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrSQPSN)
			}
		}
		e.recv(1, e.sge(0, 4096))
		return err
	case "change": // traffic class and hop limit, in SQD
		if _, err := fmt.Sscan(rest, &h.to.TrafficClass, &h.to.HopLimit); err != nil {
			return err
		}
		for _, s := range []struct {
			a    ib.QPAttr
			mask ib.QPAttrMask
		}{{ib.QPAttr{State: ib.SQD}, ib.AttrState}, {ib.QPAttr{State: ib.SQD, AH: h.to}, ib.AttrState | ib.AttrAV}, {ib.QPAttr{State: ib.RTS}, ib.AttrState}} {
			if err := h.e.q.Modify(h.e.t.Context(), &s.a, s.mask); err != nil {
				return err
			}
		}
		return nil
	case "send": // so many bytes
		var n int
		if _, err := fmt.Sscan(rest, &n); err != nil {
			return err
		}
		wr := ib.SendWR{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: h.e.sge(8192, n)}
		if h.e.q.(*QP).typ == ib.UD {
			a, err := h.e.pd.CreateAH(h.to)
			if err != nil {
				return err
			}
			defer a.Close()
			wr.AH, wr.RemoteQPN, wr.RemoteQKey = a.Num(), h.qpn, testQKey
		}
		h.e.send(wr)
		return h.e.poll().Status
	case "taken": // the GRH of what has come
		wc := h.e.poll()
		if wc.Status != ib.WCSuccess || wc.Opcode != ib.WCRecv {
			return wc
		}
		h.e.recv(1, h.e.sge(0, 4096))
		return hex.EncodeToString(h.e.buf[:ib.GRHLen])
	case "seen":
		var list []string
		for {
			b := make([]byte, 1<<16)
			n, from, err := unix.Recvfrom(h.raw, b, 0)
			if err != nil {
				return strings.Join(list, " ")
			}
			b = b[:n]
			l, _ := from.(*unix.SockaddrLinklayer)
			head := 20
			switch {
			case n > 28 && b[0]>>4 == 4 && b[9] == 17:
			case n > 48 && b[0]>>4 == 6 && b[6] == 17:
				head = 40
			default:
				continue
			}
			op := roce.Opcode(b[head+8])
			if src, dst := binary.BigEndian.Uint16(b[head:]), binary.BigEndian.Uint16(b[head+2:]); src != roce.Port && dst != roce.Port || op.HeaderLen() == 0 {
				continue
			}
			list = append(list, fmt.Sprintf("%t,%d,%s", l.Pkttype == unix.PACKET_OUTGOING, op, hex.EncodeToString(b[:head])))
		}
	}
	return "what?"
}

// A headChild is that process, seen from the test.
type headChild struct {
	*testutil.Child
	t testing.TB
}

func (c headChild) ask(line string) string {
	c.t.Helper()
	c.Send(line)
	word, _, _ := strings.Cut(line, " ")
	return strings.TrimSpace(c.Expect(word + ":"))
}

func (c headChild) want(line, want string) {
	c.t.Helper()
	if got := c.ask(line); got != want {
		c.t.Fatalf("%s: %q, want %q", line, got, want)
	}
}

// seen returns the packets that its host has seen since the last time, after one that has the opcode has come.
func (c headChild) seen(out bool, op roce.Opcode) (list []ipSeen) {
	c.t.Helper()
	for end := time.Now().Add(testutil.Patience); !slices.ContainsFunc(list, func(s ipSeen) bool { return s.Out == out && s.Opcode == op }); {
		if time.Now().After(end) {
			c.t.Fatalf("no %v was seen, only %+v", op, list)
		}
		for _, f := range strings.Fields(c.ask("seen")) {
			part := strings.Split(f, ",")
			var n uint8
			fmt.Sscan(part[1], &n)
			b, err := hex.DecodeString(part[2])
			if err != nil {
				c.t.Fatal(err)
			}
			s := ipSeen{Out: part[0] == "true", Opcode: roce.Opcode(n), Class: b[1], Hops: b[8], header: part[2]}
			if len(b) == 40 {
				s.Class, s.Hops = uint8(binary.BigEndian.Uint16(b)>>4), b[7]
			}
			list = append(list, s)
		}
	}
	return list
}

// The traffic class and hop limit of an address vector are those of the IP headers, with ECN's bits as congestion control has them, also of
// packets that leave in one piece; others have the system's. What changes in SQD, changes. A datagram's GRH is its IP header, byte by byte.
func TestIPHeaders(t *testing.T) {
	n := testutil.NewRoutedNet(t)
	a := headChild{testutil.StartChildIn(t, n.A, nil, "softnic.head"), t}
	b := headChild{testutil.StartChildIn(t, n.B, nil, "softnic.head"), t}
	const ect = 2
	for _, typ := range []string{"RC", "UC", "UD"} {
		for _, addr := range [][2]netip.Addr{{n.Addr[0].V4, n.Addr[1].V4}, {n.Addr[0].V6, n.Addr[1].V6}} {
			to := [2]string{}
			for i, c := range []headChild{a, b} {
				to[i] = fmt.Sprint(addr[i], " ", c.ask("open "+typ+" "+addr[i].String()))
			}
			a.want("join "+to[1]+" 184 17", "<nil>") // DSCP EF
			b.want("join "+to[0]+" 43 0", "<nil>")   // DSCP 10; and ECN's bits, which are not for who says so
			svc := map[string]roce.Service{"RC": roce.RC, "UC": roce.UC, "UD": roce.UD}[typ]
			check := func(list []ipSeen, class, hops, back uint8) {
				t.Helper()
				for _, s := range list {
					want := [2]uint8{class | ect, hops - 1} // there is a router
					if s.Out {
						want = [2]uint8{back | ect, 64}
					}
					if got := [2]uint8{s.Class, s.Hops}; got != want {
						t.Errorf("%s %v: %+v, want class and hop limit %v", typ, addr[0], s, want)
					}
				}
			}
			send := func(size int, op uint8, class, hops uint8) (grh, header string) {
				t.Helper()
				a.want(fmt.Sprint("send ", size), ib.WCSuccess.String())
				grh = b.ask("taken")
				list := b.seen(false, roce.Op(svc, op))
				if typ == "RC" && !slices.ContainsFunc(list, func(s ipSeen) bool { return s.Out }) {
					list = append(list, b.seen(true, roce.Op(roce.RC, roce.Acknowledge))...)
				}
				check(list, class, hops, 40)
				return grh, list[0].header
			}
			grh, header := send(100, roce.SendOnly, 184, 17)
			if typ == "UD" {
				if want := strings.Repeat("00", ib.GRHLen-len(header)/2) + header; grh != want {
					t.Errorf("%v: the GRH is\n%s, the IP header was\n%s", addr[0], grh, want)
				}
				continue
			}
			send(1000, roce.SendFirst, 184, 17) // several, of one length
			a.want("change 104 0", "<nil>")
			send(100, roce.SendOnly, 104, 64)
			a.want("change 0 255", "<nil>")
			send(100, roce.SendOnly, 0, 255)
		}
	}
}
