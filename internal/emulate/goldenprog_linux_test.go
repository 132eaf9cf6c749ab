package emulate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The language of lists of operations, which testdata/golden.c executes with stock libmlx5, and a player with this repository's driver.
// A list makes two queue pairs, A and B, which are connected to each other, and does one thing after the other with them:
//
//	list rc|uc|ud|raw SGES INLINE DEPTH RSGES RDEPTH SRQ SIGALL WINDOWS
//	                                       and fills the memory
//	wr a|b OP FLAGS TO KEY N [OFF LEN]...  one more request to post: its kind; s(ignaled), (solicited) e(vent), f(ence), i(nline), c(hecksums),
//	                                       l (a wrong lkey), or -; offset in the peer's memory, or in an immediate value; which rkey:
//	                                       r(egion's), w(indow's), x (a wrong one); and what it sends, by offsets and lengths
//	post                                   posts these requests in one call
//	rr a|b N [OFF LEN]...                  one more receive to post; rl: with a wrong lkey
//	recv a|b                               posts these receives in one call
//	wait a|b N                             polls N completions
//	arm a|b 0|1                            arms the CQ; 1: for solicited ones only
//	resize a|b N                           resizes the CQ
//	to a|b SGID LABEL SL TC HOP            sends datagrams with another address handle from now on: index of the device's GID that they go from and
//	                                       to, flow label, service level, traffic class and hop limit; before, that is 0 0 0 0 1
//	reset [N]                              takes both queue pairs to RESET and connects them again; N is how often a request tries again that
//	                                       finds no receive, 7 for as long as it takes, as it is in the beginning and without a number
//	end                                    destroys what the list has made
//
// A frame, of raw, has the addresses of the memory's first 12 bytes, which are those of the other side and its own.
//
// A window is bound to its side's own memory, by wr x bind - 0 r 1 OFF LEN, and freed by wr x inv or the peer's sendinv.

const (
	goldenSize = 8192
	goldenQKey = ib.QKey(0x11111111)

	goldenWrongKey = 0xdead00 // of no region or window
	goldenGIDs     = 2        // as many of the table are used: the device's own, and the first address of the host
)

// A goldenSide is one end of a list.
type goldenSide struct {
	at  uint64 // of mem
	mem []byte
	mr  driver.MR
	cq  driver.CQ
	srq driver.SRQ
	q   driver.QP
	ah  driver.AH
	mw  driver.MW
	key ib.RKey // the window's

	flow driver.Flow
}

// A player is golden.c.
type player struct {
	ctx   driver.Context
	pd    driver.PD
	gids  []ib.GIDEntry
	lid   ib.LID // of the port, on InfiniBand
	sides [2]goldenSide
	typ   ib.QPType
	rnr   uint8 // retries where there is no receive
	least int   // bytes of a frame that have to be inline

	sender *goldenSide
	wrs    []ib.SendWR
	rrs    []ib.RecvWR
}

const goldenRights = ib.AccessRemoteWrite | ib.AccessRemoteRead | ib.AccessRemoteAtomic

// golden plays the file that its argument names.
func golden(args []string) error {
	lists, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	p, err := newPlayer()
	if err != nil {
		return err
	}
	number := 0
	for line := range strings.Lines(string(lists)) {
		number++
		if err := p.line(strings.TrimSpace(line)); err != nil {
			return fmt.Errorf("line %d: %s: %w", number, strings.TrimSpace(line), err)
		}
	}
	return closeAll(p.sides[0].mr, p.sides[1].mr, p.pd, p.ctx)
}

func closeAll(list ...interface{ Close() error }) error {
	for _, c := range list {
		if err := c.Close(); err != nil {
			return fmt.Errorf("close %T: %w", c, err)
		}
	}
	return nil
}

func newPlayer() (*player, error) {
	p := &player{}
	devices, err := mlx5.Provider().Devices()
	if err != nil {
		return nil, err
	}
	if p.ctx, err = devices[0].Open(); err != nil {
		return nil, err
	}
	if p.pd, err = p.ctx.AllocPD(); err != nil {
		return nil, err
	}
	attr, err := p.ctx.QueryDevice()
	if err != nil {
		return nil, err
	}
	p.least = attr.MinFrameInline
	if p.gids, err = p.ctx.GIDs(1); err != nil {
		return nil, err
	}
	port, err := p.ctx.QueryPort(1)
	if err != nil {
		return nil, err
	}
	if port.LinkLayer == ib.LinkInfiniBand {
		p.lid = port.LID
	}
	a, b, err := goldenMemory()
	if err != nil {
		return nil, err
	}
	p.sides = [2]goldenSide{{at: goldenA, mem: a}, {at: goldenB, mem: b}}
	for i := range p.sides {
		s := &p.sides[i]
		s.mr, err = p.pd.RegisterMR(driver.MRConfig{Mem: s.mem, FD: -1, Access: ib.AccessLocalWrite | ib.AccessMWBind | goldenRights})
		if err != nil {
			return nil, err
		}
	}
	return p, nil
}

// side takes a side's name from the beginning of a line.
func (p *player) side(line *string) *goldenSide {
	name, rest, _ := strings.Cut(*line, " ")
	*line = rest
	if name == "b" {
		return &p.sides[1]
	}
	return &p.sides[0]
}

func (p *player) peer(s *goldenSide) *goldenSide {
	if s == &p.sides[0] {
		return &p.sides[1]
	}
	return &p.sides[0]
}

func (p *player) line(line string) error {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "#":
		return nil
	case "list":
		return p.begin(rest)
	case "end":
		return p.end()
	case "wr":
		return p.request(rest)
	case "post":
		n, err := p.sender.q.PostSend(p.wrs)
		if n < len(p.wrs) {
			return err
		}
		p.wrs = nil
		return nil
	case "rr", "rl":
		s := p.side(&rest)
		lkey := s.mr.LKey()
		if word == "rl" {
			lkey = goldenWrongKey
		}
		sges, err := s.sges(rest, lkey)
		p.rrs = append(p.rrs, ib.RecvWR{SGEs: sges})
		return err
	case "reset":
		p.rnr = ib.RNRRetryForever
		if rest != "" {
			if _, err := fmt.Sscan(rest, &p.rnr); err != nil {
				return err
			}
		}
		for i := range p.sides {
			if err := p.sides[i].q.Modify(context.Background(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
				return err
			}
		}
		return p.joinBoth()
	}
	s := p.side(&rest)
	var n int
	switch word {
	case "to":
		if err := s.ah.Close(); err != nil {
			return err
		}
		return p.to(s, rest)
	case "recv":
		defer func() { p.rrs = nil }()
		post := s.q.PostRecv
		if s.srq != nil {
			post = s.srq.PostRecv
		}
		n, err := post(p.rrs)
		if n < len(p.rrs) {
			return err
		}
		return nil
	}
	if _, err := fmt.Sscan(rest, &n); err != nil {
		return err
	}
	switch word {
	case "wait":
		return s.wait(n)
	case "arm":
		return s.cq.Arm(n == 1)
	case "resize":
		return s.cq.(driver.CQResizer).Resize(n)
	}
	return errors.New("unknown")
}

func (p *player) begin(line string) error {
	var kind string
	var sges, inline, depth, rsges, rdepth, srq, sigall, windows int
	if _, err := fmt.Sscan(line, &kind, &sges, &inline, &depth, &rsges, &rdepth, &srq, &sigall, &windows); err != nil {
		return err
	}
	p.typ = map[string]ib.QPType{"rc": ib.RC, "uc": ib.UC, "ud": ib.UD, "raw": ib.RawPacket}[kind]
	p.rnr = ib.RNRRetryForever
	for i := range p.sides {
		s := &p.sides[i]
		for k := range s.mem {
			s.mem[k] = byte(k * [2]int{7, 3}[i])
		}
		var err error
		if s.cq, err = p.ctx.CreateCQ(driver.CQConfig{Entries: 255}); err != nil {
			return err
		}
		cfg := driver.QPConfig{Type: p.typ, SendCQ: s.cq, RecvCQ: s.cq, SignalAll: sigall == 1, Loopback: p.typ == ib.RawPacket,
			Cap: ib.QPCap{MaxSendWR: depth, MaxSendSGE: sges, MaxInline: inline, MaxRecvWR: rdepth, MaxRecvSGE: rsges}}
		if srq == 1 {
			if s.srq, err = p.pd.(driver.SRQCreator).CreateSRQ(driver.SRQConfig{MaxWR: rdepth, MaxSGE: rsges}); err != nil {
				return err
			}
			cfg.SRQ, cfg.Cap.MaxRecvWR, cfg.Cap.MaxRecvSGE = s.srq, 0, 0
		}
		if s.q, err = p.pd.CreateQP(cfg); err != nil {
			return err
		}
		if p.typ == ib.RawPacket {
			if err := s.steer(goldenMACs[i], goldenMACs[1-i]); err != nil {
				return err
			}
		}
		if windows == 1 {
			if s.mw, err = p.pd.(driver.MWAllocator).AllocMW(); err != nil {
				return err
			}
			s.key = s.mw.RKey()
		}
		if p.typ == ib.UD {
			if err := p.to(s, "0 0 0 0 1"); err != nil {
				return err
			}
		}
	}
	return p.joinBoth()
}

// to makes the side's address handle. On InfiniBand, where there is one GID, index 0 is for without a global route, and others for one with it.
func (p *player) to(s *goldenSide, line string) (err error) {
	a := ib.AHAttr{Port: 1}
	if _, err := fmt.Sscan(line, &a.SGIDIndex, &a.FlowLabel, &a.SL, &a.TrafficClass, &a.HopLimit); err != nil {
		return err
	}
	global := p.lid == 0 || a.SGIDIndex != 0
	if p.lid != 0 {
		a.DLID, a.SGIDIndex = p.lid, 0
	}
	if a.SGIDIndex >= len(p.gids) || p.gids[a.SGIDIndex].Index != a.SGIDIndex {
		return fmt.Errorf("there is no GID %d", a.SGIDIndex)
	}
	if global {
		a.DGID = p.gids[a.SGIDIndex].GID
	}
	s.ah, err = p.pd.CreateAH(a)
	return err
}

var goldenMACs = [2]ib.MAC{{2, 5: 0xa}, {2, 5: 0xb}}

// steer has the side get frames to its address, and puts what frames begin with into its memory.
func (s *goldenSide) steer(mac, peer ib.MAC) (err error) {
	r := ib.FlowRule{Port: 1, Eth: &ib.FlowFilter[ib.FlowEth]{Value: ib.FlowEth{Dst: mac}, Mask: ib.FlowEth{Dst: ib.MAC{255, 255, 255, 255, 255, 255}}}}
	s.flow, err = s.q.(driver.Steerer).Steer(&r)
	copy(s.mem, peer[:])
	copy(s.mem[6:], mac[:])
	s.mem[12], s.mem[13] = 0x88, 0xb5
	return err
}

func (p *player) joinBoth() error {
	return errors.Join(p.join(&p.sides[0], &p.sides[1]), p.join(&p.sides[1], &p.sides[0]))
}

func (p *player) join(s, to *goldenSide) error {
	init := ib.QPAttr{State: ib.Init, Port: 1, QKey: goldenQKey, Access: goldenRights}
	rtr := ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: p.gids[0].GID, Port: 1, HopLimit: 1}, PathMTU: ib.MTU1024, DestQPN: to.q.QPN(), MaxDestRdAtomic: 4, MinRNRTimer: 1}
	if p.lid != 0 {
		rtr.AH = ib.AHAttr{DLID: p.lid, Port: 1}
	}
	rts := ib.QPAttr{State: ib.RTS, MaxRdAtomic: 4, AckTimeout: 18, RetryCount: 7, RNRRetry: p.rnr}
	if p.typ == ib.RawPacket {
		return joinRaw(s.q)
	}
	im, rm, sm := ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex, ib.AttrState, ib.AttrState|ib.AttrSQPSN
	if p.typ == ib.UD {
		im |= ib.AttrQKey
	} else {
		im |= ib.AttrAccess
		rm |= ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN
	}
	if p.typ == ib.UC {
		init.Access = ib.AccessRemoteWrite
	}
	if p.typ == ib.RC {
		rm |= ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer
		sm |= ib.AttrMaxRdAtomic | ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry
	}
	for _, m := range []struct {
		a    ib.QPAttr
		mask ib.QPAttrMask
	}{{init, im}, {rtr, rm}, {rts, sm}} {
		if err := s.q.Modify(context.Background(), &m.a, m.mask); err != nil {
			return fmt.Errorf("to %v: %w", m.a.State, err)
		}
	}
	return nil
}

func joinRaw(q driver.QP) error {
	for _, m := range []struct {
		a    ib.QPAttr
		mask ib.QPAttrMask
	}{{ib.QPAttr{State: ib.Init, Port: 1}, ib.AttrState | ib.AttrPort}, {ib.QPAttr{State: ib.RTR}, ib.AttrState}, {ib.QPAttr{State: ib.RTS}, ib.AttrState}} {
		if err := q.Modify(context.Background(), &m.a, m.mask); err != nil {
			return fmt.Errorf("to %v: %w", m.a.State, err)
		}
	}
	return nil
}

// head has the first n bytes of a frame inline, which libmlx5 copies itself.
func (s *goldenSide) head(wr *ib.SendWR, n int) {
	for len(wr.Inline) < n && len(wr.SGEs) > 0 {
		g := &wr.SGEs[0]
		k := min(g.Length, uint32(n-len(wr.Inline)))
		wr.Inline = append(wr.Inline, s.mem[g.Addr-s.at:][:k]...)
		if g.Addr, g.Length = g.Addr+uint64(k), g.Length-k; g.Length == 0 {
			wr.SGEs = wr.SGEs[1:]
		}
	}
}

func (p *player) end() error {
	for i := range p.sides {
		s := &p.sides[i]
		list := []interface{ Close() error }{s.q}
		if s.flow != nil {
			list = []interface{ Close() error }{s.flow, s.q}
		}
		if s.srq != nil {
			list = append(list, s.srq)
		}
		if s.mw != nil {
			list = append(list, s.mw)
		}
		if s.ah != nil {
			list = append(list, s.ah)
		}
		if err := closeAll(append(list, s.cq)...); err != nil {
			return err
		}
		s.q, s.srq, s.mw, s.ah, s.cq, s.flow = nil, nil, nil, nil, nil, nil
	}
	return nil
}

// sges reads N [OFF LEN]...
func (s *goldenSide) sges(line string, lkey ib.LKey) ([]ib.SGE, error) {
	var n int
	r := strings.NewReader(line)
	if _, err := fmt.Fscan(r, &n); err != nil {
		return nil, err
	}
	list := make([]ib.SGE, n)
	for i := range list {
		var off uint64
		if _, err := fmt.Fscan(r, &off, &list[i].Length); err != nil {
			return nil, err
		}
		list[i].Addr, list[i].LKey = s.at+off, lkey
	}
	return list, nil
}

var goldenOps = map[string]ib.Opcode{"send": ib.OpSend, "sendimm": ib.OpSendWithImm, "sendinv": ib.OpSendWithInv, "write": ib.OpRDMAWrite,
	"writeimm": ib.OpRDMAWriteWithImm, "read": ib.OpRDMARead, "fetchadd": ib.OpAtomicFetchAdd, "cmpswap": ib.OpAtomicCmpSwap,
	"bind": ib.OpBindMW, "inv": ib.OpLocalInv}

func (p *player) request(line string) (err error) {
	s := p.side(&line)
	peer := p.peer(s)
	p.sender = s
	f := strings.SplitN(line, " ", 5)
	if len(f) < 5 {
		return errors.New("too short")
	}
	var to uint32
	if _, err := fmt.Sscan(f[2], &to); err != nil {
		return err
	}
	wr := ib.SendWR{}
	var ok bool
	if wr.Opcode, ok = goldenOps[f[0]]; !ok {
		return errors.New("unknown")
	}
	lkey := s.mr.LKey()
	inline := false
	for _, c := range f[1] {
		switch c {
		case 's':
			wr.Flags |= ib.SendSignaled
		case 'e':
			wr.Flags |= ib.SendSolicited
		case 'f':
			wr.Flags |= ib.SendFence
		case 'i':
			inline = true
		case 'c':
			wr.Flags |= ib.SendChecksum
		case 'l':
			lkey = goldenWrongKey
		}
	}
	if wr.SGEs, err = s.sges(f[4], lkey); err != nil {
		return err
	}
	if inline {
		g := wr.SGEs[0]
		wr.Inline, wr.SGEs = append([]byte(nil), s.mem[g.Addr-s.at:][:g.Length]...), nil
	}
	if p.typ == ib.RawPacket {
		s.head(&wr, p.least)
	}
	rkey := peer.mr.RKey()
	switch f[3] {
	case "w":
		rkey = peer.key
	case "x":
		rkey = goldenWrongKey
	}
	switch wr.Opcode {
	case ib.OpSendWithInv:
		wr.InvalidateRKey = rkey
	case ib.OpLocalInv:
		wr.InvalidateRKey = s.key
	case ib.OpBindMW:
		g := wr.SGEs[0]
		s.key = s.key&^0xff | (s.key+1)&0xff
		wr.Bind = &ib.BindMW{Window: s.mw.Handle(), RKey: s.key, MRLKey: s.mr.LKey(), Addr: g.Addr, Length: uint64(g.Length), Access: goldenRights}
		wr.SGEs = nil
	case ib.OpAtomicFetchAdd, ib.OpAtomicCmpSwap:
		wr.RemoteAddr, wr.RKey, wr.CompareAdd = peer.at+uint64(to), rkey, 5+uint64(to)
		if wr.Opcode == ib.OpAtomicCmpSwap {
			wr.Swap = 9
		}
	default:
		if wr.Opcode == ib.OpSendWithImm || wr.Opcode == ib.OpRDMAWriteWithImm {
			wr.Imm = 0xcafe0000 + to
		}
		if p.typ == ib.UD {
			wr.AH, wr.RemoteQPN, wr.RemoteQKey = s.ah.Num(), peer.q.QPN(), goldenQKey
		} else if p.typ != ib.RawPacket && wr.Opcode != ib.OpSend && wr.Opcode != ib.OpSendWithImm {
			wr.RemoteAddr, wr.RKey = peer.at+uint64(to), rkey
		}
	}
	p.wrs = append(p.wrs, wr)
	return nil
}

func (s *goldenSide) wait(n int) error {
	var wc [1]ib.WC
	for late := time.Now().Add(time.Minute); n > 0; {
		k := s.cq.Poll(wc[:])
		if k < 0 {
			return s.cq.Err()
		}
		if n -= k; k == 0 {
			if time.Now().After(late) {
				return fmt.Errorf("%d completions have not come", n)
			}
			time.Sleep(20 * time.Microsecond) // two who spin leave the devices no processor
		}
	}
	return nil
}
