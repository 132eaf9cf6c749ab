package testutil

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Star is hosts (network namespaces) around a switch in this process, whose links to them are slow, and have a queue of finite
// length that marks packets behind a threshold (ECN). What a kernel would need queueing disciplines for, it does with TUN devices.
type Star struct {
	Hosts []StarHost

	t      testing.TB
	config StarLink
	links  []*starLink // to each host
}

// A StarHost is a host of a Star. Child processes are started in its namespace with StartChildIn.
type StarHost struct {
	Namespace string
	Addr      netip.Addr
}

// A StarLink says what the links to the hosts are like.
type StarLink struct {
	Rate  int // bytes a second
	Queue int // packets that wait at most
	Mark  int // packets behind so many are marked, if they may be
}

// StarCounts are what a link has done.
type StarCounts struct {
	From    []int // packets that it has carried, by the host that they came from
	Marked  int
	Dropped int
	Met     []int // packets that have met so many others in the queue, by how many; those that were dropped, too
}

// Percentile is how many packets at most a share p of the packets has met in the queue.
func (c *StarCounts) Percentile(p float64) int {
	sum := 0
	for _, n := range c.Met {
		sum += n
	}
	seen := 0
	for i, n := range c.Met {
		if seen += n; float64(seen) >= p*float64(sum) {
			return i
		}
	}
	return 0
}

// Fairness is Jain's index of the shares of the hosts below n: from 1/n, where one has all, to 1.
func (c *StarCounts) Fairness(n int) float64 {
	sum, squares := 0.0, 0.0
	for _, x := range c.From[:n] {
		sum += float64(x)
		squares += float64(x) * float64(x)
	}
	if squares == 0 {
		return 0
	}
	return sum * sum / (float64(n) * squares)
}

type starLink struct {
	tun    *os.File
	config StarLink
	closed chan struct{}

	mu     sync.Mutex
	some   *sync.Cond // there is a packet, or it is over
	queue  []starPacket
	over   bool
	counts StarCounts
	left   int // packets to carry until done is closed
	done   chan struct{}
}

type starPacket struct {
	from int
	b    []byte
}

// NewStar makes the network, whose hosts have an MTU of 1500 bytes; it is gone at the end of the test. Without root, ip(8), network
// namespaces or TUN devices, the test is skipped.
func NewStar(t testing.TB, hosts int, link StarLink) *Star {
	t.Helper()
	needNamespaces(t)
	s := &Star{t: t, config: link}
	t.Cleanup(s.close)
	name := fmt.Sprint("ringside-", os.Getpid(), "-", routedNets.Add(1), "-")
	for i := range hosts {
		h := StarHost{Namespace: fmt.Sprint(name, i), Addr: netip.AddrFrom4([4]byte{10, 95, 0, byte(i + 1)})}
		dev := fmt.Sprintf("rs%dx%d", os.Getpid()%100000, i)
		tun, err := openTUN(dev)
		if err != nil {
			Skip(t, fmt.Sprintf("no TUN devices here (/dev/net/tun): %v", err))
		}
		l := &starLink{tun: tun, config: link, closed: make(chan struct{}, 2)}
		l.some = sync.NewCond(&l.mu)
		l.counts = StarCounts{From: make([]int, hosts), Met: make([]int, link.Queue+1)}
		s.links = append(s.links, l)
		if out, err := exec.Command("ip", "netns", "add", h.Namespace).CombinedOutput(); err != nil {
			Skip(t, fmt.Sprintf("no network namespaces here: ip netns add: %v: %s", err, out))
		}
		s.Hosts = append(s.Hosts, h)
		for _, args := range []string{
			"link set " + dev + " netns " + h.Namespace,
			"-n " + h.Namespace + " link set lo up",
			"-n " + h.Namespace + " address add " + h.Addr.String() + "/24 dev " + dev,
			"-n " + h.Namespace + " link set " + dev + " txqueuelen 10000 up",
		} {
			if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v: %s", args, err, out)
			}
		}
	}
	for i := range s.links {
		go s.receive(i)
		go s.links[i].carry()
	}
	return s
}

// openTUN makes a TUN device in this namespace.
func openTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (s *Star) close() {
	for _, l := range s.links {
		l.mu.Lock()
		l.over = true
		l.some.Broadcast()
		l.mu.Unlock()
		l.tun.Close()
	}
	if len(s.Hosts) == len(s.links) { // else they were never started
		for _, l := range s.links {
			<-l.closed
			<-l.closed
		}
	}
	for _, h := range s.Hosts {
		exec.Command("ip", "netns", "delete", h.Namespace).Run()
	}
}

// receive takes what host i sends.
func (s *Star) receive(i int) {
	l := s.links[i]
	defer func() { l.closed <- struct{}{} }()
	buf := make([]byte, 1<<16)
	for {
		n, err := l.tun.Read(buf)
		if err != nil {
			return
		}
		if b := buf[:n]; n >= 20 && b[0] == 0x45 && b[16] == 10 && b[17] == 95 && b[18] == 0 && b[19] > 0 && int(b[19]) <= len(s.links) {
			s.links[b[19]-1].take(starPacket{i, append([]byte(nil), b...)})
		}
	}
}

// take queues a packet.
func (l *starLink) take(p starPacket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(l.queue)
	l.counts.Met[min(n, l.config.Queue)]++
	switch {
	case n >= l.config.Queue:
		l.counts.Dropped++
		return
	case n >= l.config.Mark && p.b[1]&3 != 0:
		l.counts.Marked++
		markIP(p.b[:20])
	}
	l.queue = append(l.queue, p)
	l.some.Signal()
}

// markIP sets the mark for congestion (RFC 3168) in an IPv4 header.
func markIP(h []byte) {
	h[1] |= 3
	h[10], h[11] = 0, 0
	sum := uint32(0)
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
}

// carry hands packets to the host, as fast as the rate allows.
func (l *starLink) carry() {
	defer func() { l.closed <- struct{}{} }()
	// A sleep takes longer than it should: what was missed is made good for.
	const grain, credit = 300 * time.Microsecond, 2 * time.Millisecond
	free := time.Now()
	for {
		l.mu.Lock()
		for len(l.queue) == 0 && !l.over {
			l.some.Wait()
		}
		if l.over {
			l.mu.Unlock()
			return
		}
		p := l.queue[0]
		l.mu.Unlock()
		if late := time.Now().Add(-credit); free.Before(late) {
			free = late
		}
		free = free.Add(time.Duration(len(p.b)) * time.Second / time.Duration(l.config.Rate))
		if wait := time.Until(free); wait > grain {
			time.Sleep(wait)
		}
		l.mu.Lock()
		l.queue[0].b = nil
		if l.queue = l.queue[1:]; len(l.queue) == 0 {
			l.queue = nil
		}
		l.counts.From[p.from]++
		if l.left--; l.left == 0 && l.done != nil {
			close(l.done)
			l.done = nil
		}
		l.mu.Unlock()
		l.tun.Write(p.b) // a host that is not up does not hear it
	}
}

// Count waits until the link to host i has carried so many more packets, and returns what it has done meanwhile.
func (s *Star) Count(i, packets int) *StarCounts {
	s.t.Helper()
	l := s.links[i]
	done := make(chan struct{})
	l.mu.Lock()
	c := &l.counts
	*c = StarCounts{From: make([]int, len(c.From)), Met: make([]int, len(c.Met))}
	l.left, l.done = packets, done
	l.mu.Unlock()
	select {
	case <-done:
	case <-time.After(4 * Patience):
		l.mu.Lock()
		defer l.mu.Unlock()
		s.t.Fatalf("the link to host %d has carried only %d of %d packets", i, packets-l.left, packets)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r := *c
	r.From, r.Met = append([]int(nil), c.From...), append([]int(nil), c.Met...)
	return &r
}
