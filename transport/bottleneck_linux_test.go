package transport_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func init() {
	testutil.RegisterChild("star-sink", starSink)
	testutil.RegisterChild("star-source", starSource)
	testutil.RegisterChild("star-mouse", starMouse)
}

var starConfig = transport.Config{Device: "soft0", Path: transport.PathUDP, PollMode: transport.Event}

const starWrite = 128 << 10 // bytes of a WRITE

// starSink grants each connection memory to write to, and then echoes.
func starSink(args []string) {
	ctx := context.Background()
	l, err := transport.Listen(ctx, args[0], &starConfig)
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("listening", l.Addr())
	for {
		c, err := l.Accept(ctx)
		if err != nil {
			return
		}
		go func() {
			m, err := mr.Alloc(c.PD(), starWrite, ib.AccessLocalWrite|ib.AccessRemote)
			if err != nil {
				fmt.Println("error", err)
				return
			}
			g, err := c.Grant(ctx, m, 0, starWrite, ib.AccessRemoteWrite)
			if err != nil {
				fmt.Println("error", err)
				return
			}
			raw, _ := g.Remote().MarshalBinary()
			for c.Send(ctx, raw) == nil {
				if c.Recv(ctx, func(*transport.Message) error { return nil }) != nil {
					return
				}
			}
		}()
	}
}

// starSource writes as much as it can once it is told to.
func starSource(args []string) {
	ctx := context.Background()
	c, err := transport.Dial(ctx, args[0], &starConfig)
	if err != nil {
		fmt.Println("error", err)
		return
	}
	var to transport.Remote
	if err := c.Recv(ctx, func(m *transport.Message) error { return to.UnmarshalBinary(m.Bytes()) }); err != nil {
		fmt.Println("error", err)
		return
	}
	m, err := mr.Alloc(c.PD(), starWrite, ib.AccessLocalWrite)
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("ready")
	<-testutil.ChildInput()
	for range 8 {
		go func() {
			for {
				if err := c.Write(ctx, m.SGE(0, starWrite), to, 0); err != nil {
					fmt.Println("error", err)
					return
				}
			}
		}()
	}
	<-testutil.ChildInput()
}

// starMouse sends short messages, one after the other's echo, until it is told to end, and says how many there were.
func starMouse(args []string) {
	ctx := context.Background()
	c, err := transport.Dial(ctx, args[0], &starConfig)
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("ready")
	for n := 0; ; n++ {
		err := c.Recv(ctx, func(*transport.Message) error { return nil })
		if err == nil {
			err = c.Send(ctx, []byte("hello"))
		}
		if err != nil {
			fmt.Println("error", err)
			return
		}
		select {
		case <-testutil.ChildInput():
			fmt.Println("echoes", n)
			return
		default:
		}
	}
}

// starOf makes a Star of so many sources (hosts 0 to n-1) that write to the last host, and whatever further children there are. All have
// connected before any writes: through a full queue, one might not.
func starOf(t *testing.T, cc string, sources int, further ...string) (s *testutil.Star, sink int, children []*testutil.Child) {
	t.Helper()
	softOnly(t)
	sink = sources + len(further)
	s = testutil.NewStar(t, sink+1, testutil.StarLink{Rate: 12e6, Queue: 256, Mark: 20})
	env := []string{"RINGSIDE_SOFT_CC=" + cc}
	addr := testutil.StartChildIn(t, s.Hosts[sink].Namespace, env, "star-sink", netip.AddrPortFrom(s.Hosts[sink].Addr, 7000).String()).Expect("listening ")
	for i := range sink {
		what := "star-source"
		if i >= sources {
			what = further[i-sources]
		}
		c := testutil.StartChildIn(t, s.Hosts[i].Namespace, env, what, addr)
		c.Expect("ready")
		children = append(children, c)
	}
	for _, c := range children[:sources] {
		c.Send("write")
	}
	return s, sink, children
}

// starPackets is how many packets a measurement takes: by hand, PACKETS=1000000 takes more.
func starPackets(t *testing.T) int {
	if p := os.Getenv("PACKETS"); p != "" {
		n, err := strconv.Atoi(p)
		if err != nil {
			t.Fatalf("PACKETS: %v", err)
		}
		return n
	}
	return 8000
}

// Many to one, through a slow link of a network that marks packets: each has a share, the queue is short, and nothing is lost. Without
// congestion control the queue is full, and what does not fit is lost.
func TestBottleneck(t *testing.T) {
	const sources = 4
	for _, cc := range []string{"on", "off"} {
		s, sink, _ := starOf(t, cc, sources)
		s.Count(sink, 4000)
		r := s.Count(sink, starPackets(t))
		t.Logf("congestion control %s: fairness %.3f of %v, %d dropped, %d marked, queue p50 %d p99 %d", cc, r.Fairness(sources), r.From[:sources], r.Dropped, r.Marked,
			r.Percentile(0.5), r.Percentile(0.99))
		good := r.Fairness(sources) > 0.8 && r.Dropped == 0 && r.Marked > 0 && r.Percentile(0.99) < 128
		if good != (cc == "on") {
			t.Errorf("congestion control %s: see above", cc)
		}
	}
}

// Short messages meet a short queue behind those who send all that they can, and none of them is lost.
func TestBottleneckShort(t *testing.T) {
	const sources = 3
	for _, cc := range []string{"on", "off"} {
		s, sink, children := starOf(t, cc, sources, "star-mouse")
		s.Count(sink, 4000)
		r := s.Count(sink, starPackets(t))
		mouse := children[sources]
		mouse.Send("end")
		echoes := mouse.Expect("echoes ")
		t.Logf("congestion control %s: %s echoes, %v packets, %d dropped, queue p50 %d p99 %d", cc, echoes, r.From[:sources+1], r.Dropped, r.Percentile(0.5), r.Percentile(0.99))
		good := r.From[sources] > 20 && r.Dropped == 0 && r.Percentile(0.99) < 128
		if good != (cc == "on") {
			t.Errorf("congestion control %s: see above", cc)
		}
	}
}
