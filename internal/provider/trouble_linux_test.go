package provider_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// says checks that an error has each of the words.
func says(t *testing.T, what string, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error", what)
		return
	}
	t.Logf("%s: %v", what, err)
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q is missing from: %v", what, w, err)
		}
	}
}

// meet connects a to b by package transport, and sends a message.
func meet(a, b *device) (*transport.Conn, *transport.Conn, error) {
	ctx, cancel := context.WithTimeout(background, testutil.Patience)
	defer cancel()
	l, err := transport.Listen(ctx, "127.0.0.1:0", &transport.Config{Context: b.Context, HandshakeTimeout: testutil.Patience, Linger: time.Second})
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	accepted := make(chan *transport.Conn, 1)
	go func() {
		c, _ := l.Accept(ctx)
		accepted <- c
	}()
	c, err := transport.Dial(ctx, l.Addr().String(), &transport.Config{Context: a.Context, HandshakeTimeout: testutil.Patience, Linger: time.Second})
	if err != nil {
		cancel()
		<-accepted
		return nil, nil, err
	}
	s := <-accepted
	if err := c.Send(ctx, []byte("hello")); err != nil {
		return nil, nil, err
	}
	if err := s.Recv(ctx, func(*transport.Message) error { return nil }); err != nil {
		return nil, nil, err
	}
	return c, s, nil
}

// What is wrong with this side's device or its net device is said with the device, the operation, and what to do; which helps.
func TestTrouble(t *testing.T) {
	forKinds(t, func(t *testing.T, kind string) {
		d := newDevice(t, kind, kind+"d")
		n := newNode(t, d, nil)
		connect := func(sgid int) error {
			return n.q.Connect(background, qp.ConnectParams{Remote: qp.Endpoint{GID: ib.GIDFromAddr(d.addr), QPN: n.q.QPN()}, SGIDIndex: sgid})
		}
		dial := func() error {
			q := n.newQP()
			defer testutil.Close(t, q)
			ctx, cancel := context.WithTimeout(background, testutil.Patience)
			defer cancel()
			_, err := q.Dial(ctx, netip.AddrPortFrom(d.addr, 0), netip.AddrPortFrom(d.addr, 7473), qp.CMParams{})
			return err
		}
		transported := func() error {
			c, s, err := meet(d, d)
			if err == nil {
				testutil.Close(t, s, c)
			}
			return err
		}
		if kind == "rxe" {
			has := []string{d.Name(), "no GID at index 7", fmt.Sprintf("%d (%v, RoCE v2)", d.gid(), d.addr)}
			says(t, "an empty slot", connect(7), append(has, "modify_qp")...)
			_, err := n.pd.NewAH(ib.AHAttr{DGID: ib.GIDFromAddr(d.addr), SGIDIndex: 7, HopLimit: 1, Port: 1})
			says(t, "an empty slot", err, append(has, "create_ah")...)
			_, err = d.GID(1, 7)
			says(t, "an empty slot", err, append(has, "query_gid")...)
		}

		ip(t, "link set "+d.netdev+" down")
		testutil.Eventually(t, "the port is down", func() bool { p, err := d.QueryPort(1); return err == nil && p.State == ib.PortDown })
		down := []string{d.Name(), "port 1 is DOWN", "`ip link set " + d.netdev + " up`"}
		if kind == "rxe" {
			err := connect(d.gid())
			says(t, "Connect on a port that is down", err, append(down, "modify_qp")...)
			if !errors.Is(err, verbs.ErrUnreachable) {
				t.Error(err)
			}
		}
		says(t, "Dial on a port that is down", dial(), append(down, "rdma_connect")...)
		err := transported()
		says(t, "transport on a port that is down", err, down...)
		var he *transport.HandshakeError
		if !errors.As(err, &he) || he.Code != transport.RefusedUnreachable || !errors.Is(err, verbs.ErrUnreachable) {
			t.Error(err)
		}
		ip(t, "link set "+d.netdev+" up")
		testutil.Eventually(t, "the port is up", func() bool { p, err := d.QueryPort(1); return err == nil && p.State == ib.PortActive })
		if err := transported(); err != nil {
			t.Error(err)
		}

		ip(t, "address flush dev "+d.netdev)
		testutil.Eventually(t, "the address is gone", func() bool { return d.gid() < 0 })
		says(t, "transport without an address", transported(), d.Name(), "`ip address add ADDRESS/PREFIX dev "+d.netdev+"`")
		says(t, "Dial without an address", dial(), d.Name(), "rdma_connect", "no RDMA device stands on that address")
		ip(t, "address add "+d.addr.String()+"/24 dev "+d.netdev)
		testutil.Eventually(t, "the address is back", func() bool { return kind == "siw" || d.gid() >= 0 })
		if err := transported(); err != nil {
			t.Error(err)
		}
		n.close()
		testutil.Close(t, d)
	})
}

// A net device that goes down under traffic ends what goes over it within a bound, with an event; and when it is up again, new
// connections work.
func TestLinkDownUnderTraffic(t *testing.T) {
	forKinds(t, func(t *testing.T, kind string) {
		a, b := newDevices(t, kind, kind+"l")
		r := newRig(t, a, b, nil)
		c, s, err := meet(a, b)
		if err != nil {
			t.Fatal(err)
		}
		s.SetHandler(drain{})

		events := make(chan ib.EventType, 16)
		ctx, cancel := context.WithCancel(background)
		pumped := make(chan struct{})
		go func() {
			defer close(pumped)
			for {
				e, err := a.AsyncEvent(ctx)
				if err != nil {
					return
				}
				t.Log("event:", e)
				events <- e.Type
			}
		}()
		event := func(want ib.EventType) {
			t.Helper()
			within(t, "the event "+want.String(), func() {
				for e := range events {
					if e == want {
						return
					}
				}
			})
		}
		wrote, sent := make(chan struct{}), make(chan struct{})
		var wroteErr, sentErr error
		raw := make(chan struct{})
		go func() {
			defer close(raw)
			wroteErr = r.writeOn(func(n int) {
				if n == 20 {
					close(wrote)
				}
			})
		}()
		msgs := make(chan struct{})
		go func() {
			defer close(msgs)
			for n := 1; sentErr == nil; n++ {
				if sentErr = c.Send(background, make([]byte, 3000)); n == 20 {
					close(sent)
				}
			}
		}()
		within(t, "traffic", func() { <-wrote; <-sent })
		ip(t, "link set "+a.netdev+" down")
		start := time.Now()
		event(ib.EventPortErr)
		within(t, "the end of the writes", func() { <-raw })
		t.Logf("after %v: %v", time.Since(start), wroteErr)
		within(t, "the end of the connection", func() { <-msgs })
		t.Logf("after %v: %v", time.Since(start), sentErr)
		var end *transport.CloseError
		told := errors.As(sentErr, &end) && end.Remote && strings.Contains(end.Reason, transport.ErrPeerDied.Error())
		// The other side may be the first to know, and where rxe finds no route any more, it says so.
		if !told && !errors.Is(sentErr, transport.ErrPeerDied) && !errors.Is(sentErr, ib.WCLocalQPOpErr) {
			t.Errorf("%v, want %v or %v", sentErr, transport.ErrPeerDied, ib.WCLocalQPOpErr)
		}
		within(t, "Close", func() {
			c.Close()
			s.Close()
			r.close()
		})

		ip(t, "link set "+a.netdev+" up")
		a.route(t, b)
		event(ib.EventPortActive)
		if c, s, err = meet(a, b); err != nil {
			t.Error(err)
		} else {
			testutil.Close(t, s, c)
		}
		cancel()
		<-pumped
		testutil.Close(t, a, b)
	})
}

// Requests that go into a link without a carrier end, although rxe, left to itself, would send them again for ever.
func TestCarrierLost(t *testing.T) {
	forKinds(t, func(t *testing.T, kind string) {
		if kind == "siw" {
			return // it is TCP's patience there, which is the system's
		}
		a, b := newDevices(t, kind, kind+"v")
		r := newRig(t, a, b, nil)
		var err error
		within(t, "the end of the writes", func() {
			err = r.writeOn(func(n int) {
				if n == 2 {
					ip(t, "link set "+b.netdev+" down") // of which a hears, but goes on sending
				}
			})
		})
		if !errors.Is(err, ib.WCFlushErr) {
			t.Errorf("%v, want %v", err, ib.WCFlushErr)
		}
		r.close()
		ip(t, "link set "+b.netdev+" up")
		testutil.Close(t, a, b)
	})
}

// A queue pair that loses its way is told so, also while requests wait for an acknowledgement that does not come: rxe, left to itself, says
// nothing then.
func TestWayLostUnderRequests(t *testing.T) {
	forKinds(t, func(t *testing.T, kind string) {
		if kind == "siw" {
			return // which has its own connection
		}
		a, b := newDevices(t, kind, kind+"w")
		r := &rig{t, newNode(t, a, nil), newNode(t, b, nil)}
		for _, x := range [][2]*node{{r.a, r.b}, {r.b, r.a}} {
			from, to := x[0], x[1]
			p := qp.ConnectParams{Remote: qp.Endpoint{GID: ib.GIDFromAddr(to.dev.addr), QPN: to.q.QPN(), PSN: 7}, LocalPSN: 7, SGIDIndex: from.dev.gid(),
				AckTimeout: 8 * time.Second} // nothing is sent again meanwhile
			if err := from.q.Connect(background, p); err != nil {
				t.Fatal(err)
			}
		}
		post := func() {
			if _, err := r.a.q.PostSend([]ib.SendWR{r.write(64)}); err != nil {
				t.Fatal(err)
			}
		}
		ip(t, "link set "+b.netdev+" down") // what is sent is lost
		post()
		post()
		ip(t, "link set "+a.netdev+" down") // and now nothing can be sent
		post()
		wcs := make([]ib.WC, 4)
		for n := 0; n < 3; {
			var got int
			var err error
			testutil.Eventually(t, "a request ends", func() bool { got, err = r.a.cq.Poll(wcs); return got > 0 || err != nil })
			for i := range wcs[:got] {
				if wcs[i].Status == ib.WCSuccess {
					t.Errorf("request %d has succeeded", n+i)
				}
			}
			if n += got; err != nil {
				t.Fatal(err)
			}
		}
		r.close()
		ip(t, "link set "+b.netdev+" up")
		ip(t, "link set "+a.netdev+" up")
		testutil.Close(t, a, b)
	})
}

type drain struct{}

func (drain) HandleMessage(*transport.Conn, *transport.Message) {}
func (drain) HandleClose(*transport.Conn, error)                {}

// writeOn writes one block after the other until that fails, and tells the count.
func (r *rig) writeOn(tell func(n int)) error {
	wcs := make([]ib.WC, 1)
	for n := 1; ; n++ {
		if _, err := r.a.q.PostSend([]ib.SendWR{r.write(4096)}); err != nil {
			return err
		}
		for {
			got, err := r.a.cq.Poll(wcs)
			if err == nil && got > 0 {
				err = verbs.CheckWC("write", &wcs[0])
			}
			if err != nil {
				return err
			}
			if got > 0 {
				break
			}
			time.Sleep(100 * time.Microsecond)
		}
		tell(n)
	}
}

func init() {
	testutil.RegisterChild("open", func(args []string) {
		for _, name := range args {
			c, err := verbs.Open(name)
			if err == nil {
				err = c.Close()
			}
			fmt.Printf("open %q\n", fmt.Sprint(err)) // which has several lines
		}
		_, err := transport.Listen(background, "127.0.0.1:0", &transport.Config{Device: args[0]})
		fmt.Printf("listen %q\n", fmt.Sprint(err))
	})
}

// Where a device belongs to one network namespace, others hear why they cannot have it, and what to do.
func TestNetNSExclusive(t *testing.T) {
	forKinds(t, func(t *testing.T, kind string) {
		const ns = "ringside-exclusive"
		rdma := func(args string) bool {
			out, err := exec.Command("rdma", strings.Fields(args)...).CombinedOutput()
			if err != nil {
				t.Logf("rdma %s: %v: %s", args, err, out)
			}
			return err == nil
		}
		// The kernel refuses to change the mode as long as there is a second namespace, which other tests may just have.
		testutil.Eventually(t, "the mode is exclusive", func() bool { return rdma("system set netns exclusive") })
		defer testutil.Eventually(t, "the mode is shared", func() bool { return rdma("system set netns shared") })
		ip(t, "netns add "+ns)
		defer ip(t, "netns delete "+ns)
		name := kind + "0"
		c := testutil.StartChildIn(t, ns, nil, "open", name)
		for _, what := range []string{"open", "listen"} {
			says(t, what, errors.New(c.Expect(what)), name, "open_device", "in another network namespace", "`rdma dev set NAME netns NAMESPACE`",
				"`rdma system set netns shared`")
		}
		c.Wait()
		v, err := verbs.Open(name) // where it belongs, all is as before
		if err != nil {
			t.Fatal(err)
		}
		testutil.Close(t, v)
	})
}
