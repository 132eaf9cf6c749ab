package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Software NICs can meet in memory, over UDP, or by a TCP connection. Each side offers all in its hello, unless its configuration rules
// some out; the listener, who has seen both hellos, chooses, and says so in its own.

// offerPaths adds to the hello how a software NIC can be met other than in memory. t is the type of the GID that stands in the hello,
// near the own address that the peer reaches.
func (c *Conn) offerPaths(h *hello, t ib.GIDType, near netip.Addr) error {
	want := c.cfg.Path
	if t != ib.GIDSoft {
		if want != PathAny {
			return refuse(RefusedResources, nil, "Config.Path is %q, and device %s is no software NIC: it has one path", want, c.p.vctx.Name())
		}
		return nil
	}
	if want == PathMemory {
		return nil
	}
	if _, ok := c.tcp.(*net.TCPConn); ok && want != PathUDP {
		h.Features |= featureTCP
	}
	if want == PathTCP {
		h.Features |= featureViaTCP
		return nil
	}
	end, index, err := udpEndOf(c.p.vctx, near)
	if err != nil {
		if want == PathUDP {
			return refuse(RefusedResources, err, "UDP from %v: %v", near, err)
		}
		c.noUDP = err
		return nil
	}
	c.udpSGID = index
	h.UDP = end
	h.Features |= featureUDP
	if want == PathUDP {
		h.Features |= featureViaUDP
	}
	return nil
}

// udpEndOf opens the device to the network at near, an address of this host.
func udpEndOf(v *verbs.Context, near netip.Addr) (udpEnd, int, error) {
	g, err := v.SourceGIDOf(1, near, ib.GIDRoCEv2)
	if err != nil {
		return udpEnd{}, 0, err
	}
	if g.GID.Addr() != near.Unmap().WithZone("") {
		return udpEnd{}, 0, fmt.Errorf("device %s has no GID for this address", v.Name())
	}
	port, err := v.UDPPort(1, g.Index)
	if err != nil {
		return udpEnd{}, 0, err
	}
	return udpEnd{GID: g.GID, Port: port, MTU: g.MTU}, g.Index, nil
}

// choosePath is the listener's decision. Its hello is to say so.
func (c *Conn) choosePath(ctx context.Context, mine, theirs *hello) error {
	both, either := mine.Features&theirs.Features, mine.Features|theirs.Features
	onlyUDP, onlyTCP := either&featureViaUDP != 0, either&featureViaTCP != 0
	switch {
	case onlyTCP && both&featureTCP == 0:
		return refuse(RefusedUnreachable, nil, "TCP is wanted (Config.Path), and not offered by both sides")
	case onlyUDP && both&featureUDP == 0:
		return refuse(RefusedUnreachable, c.noUDP, "UDP is wanted (Config.Path), and not offered by both sides%s", because(c.noUDP))
	case onlyTCP:
		c.takeTCP(mine, theirs, nil, nil)
		return nil
	}
	var memory error
	if !onlyUDP {
		if memory = c.meet(ctx, mine, theirs); memory == nil {
			return nil
		}
	}
	noUDP := c.noUDP
	if both&featureUDP != 0 {
		if noUDP = c.probeUDP(ctx, mine, theirs); noUDP == nil {
			c.takeUDP(mine, theirs, memory)
			return nil
		}
	}
	switch {
	case both&featureTCP != 0 && !onlyUDP && ctx.Err() == nil:
		c.takeTCP(mine, theirs, memory, noUDP)
		return nil
	case both&featureUDP == 0:
		return memory
	case memory != nil:
		return refuse(RefusedUnreachable, noUDP, "%v; and no shared memory: %v", noUDP, memory)
	}
	return refuse(RefusedUnreachable, noUDP, "%v", noUDP)
}

// probeUDP has the device find out whether packets pass between both sides, and of which path MTU: the hello says so. A rung that
// does not carry must not be taken: the connection would end with the first message, and nobody would know why.
func (c *Conn) probeUDP(ctx context.Context, mine, theirs *hello) error {
	most := min(mine.UDP.MTU, theirs.UDP.MTU)
	m, err := c.p.vctx.ProbePath(ctx, c.udpPeer(theirs), theirs.QPN, most)
	if err != nil {
		return err
	}
	if m < most {
		c.narrow = fmt.Sprintf("path MTU %d, though the devices have room for %d: longer packets do not arrive", m.Bytes(), most.Bytes())
	}
	mine.UDP.MTU = m
	return nil
}

// udpPeer is where the peer is met by packets.
func (c *Conn) udpPeer(theirs *hello) *ib.AHAttr {
	return &ib.AHAttr{DGID: theirs.UDP.GID, SGIDIndex: c.udpSGID, UDPPort: theirs.UDP.Port, Port: 1}
}

// lostReason says why a peer that was reached over a network does not answer any more, if that is the network.
func (c *Conn) lostReason() string {
	if c.viaTCP {
		if err := c.q.StreamErr(); err != nil {
			return err.Error()
		}
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), lostTime)
	defer cancel()
	switch m, err := c.p.vctx.ProbePath(ctx, c.udpTo, c.udpQPN, c.udpMTU); {
	case err != nil:
		return err.Error()
	case m < c.udpMTU:
		return fmt.Sprintf("packets of path MTU %d do not arrive any more, those of %d do: a link on the way has changed; a new connection finds out what fits",
			c.udpMTU.Bytes(), m.Bytes())
	}
	return "" // what stopped them is over, or the peer was stopped for too long, or it is another error that ends the connection
}

// lostTime bounds lostReason: the connection has ended already.
const lostTime = 500 * time.Millisecond

// followPath does as the listener has decided.
func (c *Conn) followPath(ctx context.Context, mine, theirs *hello) error {
	if theirs.Features&featureViaTCP != 0 {
		if mine.Features&featureTCP == 0 {
			return refuse(RefusedUnreachable, nil, "the listener wants TCP, and this side does not offer it")
		}
		if theirs.Features&featureStream == 0 {
			return refuse(RefusedProtocol, nil, "the listener chooses TCP, and has no token for it")
		}
		var udp error
		if theirs.StreamWhy != "" {
			udp = errors.New(theirs.StreamWhy)
		}
		c.takeTCP(mine, theirs, nil, udp)
		return nil
	}
	switch via := theirs.Features&featureViaUDP != 0; {
	case mine.Features&featureViaTCP != 0:
		return refuse(RefusedUnreachable, nil, "TCP is wanted (Config.Path), and the listener does not offer it")
	case via && mine.Features&featureUDP == 0:
		return refuse(RefusedUnreachable, c.noUDP, "the listener wants UDP, and this side does not offer it%s", because(c.noUDP))
	case via:
		c.takeUDP(mine, theirs, nil)
		return nil
	case mine.Features&featureViaUDP != 0:
		return refuse(RefusedUnreachable, nil, "UDP is wanted (Config.Path), and the listener does not offer it")
	}
	return c.meet(ctx, mine, theirs)
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

// meet finds out whether the device reaches the GID in the peer's hello.
func (c *Conn) meet(ctx context.Context, mine, theirs *hello) error {
	if cm := mine.Features & featureCM; cm != theirs.Features&featureCM {
		with, without := c.p.vctx.Name(), theirs.deviceName()
		if cm == 0 {
			with, without = without, with
		}
		return refuse(RefusedUnreachable, nil, "device %s is connected by the connection manager only (iWARP), and device %s is of another kind", with, without)
	}
	path, err := c.p.vctx.CheckReach(ctx, theirs.GID)
	if errors.Is(err, errors.ErrUnsupported) {
		err = nil // the device finds out when it connects
	}
	if err != nil {
		why := hostReasons(mine, theirs)
		if why != "" {
			why = " (" + why + ")"
		}
		return refuse(RefusedUnreachable, err, "device %s cannot reach the peer's GID %v: %v%s", c.p.vctx.Name(), theirs.GID, err, why)
	}
	c.setPath(path, mine, theirs)
	return nil
}

// takeUDP has the connection go over UDP. memory is why not through memory, if that was tried.
func (c *Conn) takeUDP(mine, theirs *hello, memory error) {
	c.viaUDP = true
	mine.Features |= featureViaUDP
	c.udpTo, c.udpQPN, c.udpMTU = c.udpPeer(theirs), theirs.QPN, min(mine.UDP.MTU, theirs.UDP.MTU)
	c.setPath("udp", mine, theirs)
	if c.narrow != "" {
		c.path.Reasons = append(c.path.Reasons, c.narrow)
	}
	c.noMemory(mine, theirs, memory, PathUDP, "UDP", theirs.Features&featureViaUDP != 0)
}

// takeTCP has the queue pairs be connected by a TCP connection of their own. memory and udp are why not in better ways, if these were
// tried.
func (c *Conn) takeTCP(mine, theirs *hello, memory, udp error) {
	c.viaTCP = true
	mine.Features |= featureViaTCP
	wanted := theirs.Features&featureViaTCP != 0
	c.setPath("tcp", mine, theirs)
	c.noMemory(mine, theirs, memory, PathTCP, "TCP", wanted)
	switch {
	case udp != nil:
		mine.StreamWhy = udp.Error()
		c.path.Reasons = append(c.path.Reasons, "no UDP: "+udp.Error())
	case c.cfg.Path == PathTCP:
		c.path.Reasons = append(c.path.Reasons, "no UDP: Config.Path is tcp")
	case wanted:
		c.path.Reasons = append(c.path.Reasons, "no UDP: the peer wants TCP")
	default:
		mine.StreamWhy = "it is not offered by both sides"
		c.path.Reasons = append(c.path.Reasons, "no UDP: "+mine.StreamWhy)
	}
}

// noMemory says why the path is not memory: this side wants another, or the peer does, or memory is the reason, or their hosts.
func (c *Conn) noMemory(mine, theirs *hello, memory error, want Path, name string, wanted bool) {
	switch why := hostReasons(mine, theirs); {
	case c.cfg.Path == want:
		c.path.Reasons = append(c.path.Reasons, "no shared memory: Config.Path is "+string(want))
	case wanted && memory == nil && why == "":
		c.path.Reasons = append(c.path.Reasons, "no shared memory: the peer wants "+name)
	case mine.HostID != theirs.HostID: // setPath has said so
	case why != "":
		c.path.Reasons = append(c.path.Reasons, "no shared memory: "+why)
	case memory != nil:
		c.path.Reasons = append(c.path.Reasons, "no shared memory: "+memory.Error())
	}
}

func (c *Conn) setPath(rung string, mine, theirs *hello) {
	same := mine.HostID == theirs.HostID
	reasons := choiceReasons(c.p.vctx)
	if !same {
		reasons = append(reasons, "no shared memory: the peer is on another host")
	}
	c.path = PathInfo{Rung: rung, Device: c.p.vctx.Name(), Provider: c.p.vctx.Provider(), SameHost: same, Reasons: reasons}
}

// choiceReasons says why a better device was not taken.
func choiceReasons(v *verbs.Context) []string {
	var s []string
	for _, p := range v.Choice().Passed {
		s = append(s, p.String())
	}
	return s
}

// hostReasons says what the peers' identities tell about why they cannot share memory.
func hostReasons(mine, theirs *hello) string {
	switch {
	case mine.HostID != theirs.HostID:
		return "the peer is on another host"
	case mine.UID != theirs.UID:
		return fmt.Sprintf("the peer runs as user %d and this process as %d: memory is shared within one user only", theirs.UID, mine.UID)
	case mine.PIDNS != theirs.PIDNS || mine.MountNS != theirs.MountNS:
		return "the peer runs in another container (process or mount namespace)"
	}
	return ""
}
